"""Answer extraction, as a table of what models really write."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from qtool.evaluate.tasks.extract import (
    cut,
    program_from_chat,
    program_from_completion,
    stop_at_end_of_function,
    without_examples,
)
from qtool.evaluate.tasks.extract_javascript import program_from_javascript_chat
from qtool.evaluate.tasks.problems import Problem
from qtool.evaluate.tasks.prompts import finished, program
from qtool.evaluate.tasks.reply import fenced, last_block

PROMPT = 'def double(x: int) -> int:\n    """Twice x.\n    >>> double(2)\n    4\n    """\n'
WITH_IMPORT = "import math\nfrom typing import List\n\n\ndef helper(x):\n    return 2 * x\n\n\n" + PROMPT
FULL = "def double(x: int) -> int:\n    return 2 * x\n"


def run(program: str) -> Callable[[int], Any]:
    namespace: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(program, namespace)
    function: Callable[[int], Any] = namespace["double"]
    return function


COMPLETIONS = {
    "plain": "    return 2 * x\n",
    "next function": "    return 2 * x\n\n\ndef other(y):\n    return broken(",
    "class": "    return 2 * x\nclass A:\n    x = (",
    "comment at column 0": "    return 2 * x\n# test\nassert double(2) == 5",
    "comment in the body": "    # double it\n    return 2 * x\n",
    "main guard": "    return 2 * x\n\nif __name__ == '__main__':\n    raise SystemExit(1)\n",
    "print": "    return 2 * x\n\nprint(double(3)",
    "assert": "    return 2 * x\n\nassert double(2) == 5",
    "fence": "    return 2 * x\n```\nThis function doubles.",
    "decorator": "    return 2 * x\n\n@cache\ndef f(",
    "nested function": "    def twice(y):\n        return 2 * y\n    return twice(x)\n\ndef junk(",
    "helper below": "    return twice(x)\n\n\ndef twice(y):\n    return _two() * y\n\ndef _two():\n    return 2\n",
    "helper below, cut": "    return twice(x)\n\ndef twice(y):\n    return 2 * y\n\ndef more(z):\n    ret = (",
    "string at column 0": '    s = """\ndef no\n# no\n"""\n    return 2 * x if s else 0\n\ndef junk(',
    "bracket at column 0": "    v = [\n2,\n# two\n]\n    return v[0] * x\n\nprint(",
    "quote in comment": "    # don't\n    return 2 * x\n\ndef junk(",
    "windows lines": "    return 2 * x\r\n\r\ndef junk(",
    "special token": "    return 2 * x<|endoftext|>import os\nraise",
    "fim token": "    return 2 * x\n<|fim_middle|>zzz",
    "another docstring": '    return 2 * x\n\n"""\nExample\n',
    "regex escape": "    import re\n    re.compile('\\d')\n    return 2 * x\n\ndef junk(",
    "redefinition below is dropped": "    return 2 * x\n\ndef double(x):\n    return 0\n",
}

COMPLETIONS |= {
    "prompt repeated": f"{PROMPT}    return 2 * x\n\n\ndef other(y):\n    return broken(",
    "header repeated": "\ndef double(x):\n    return 2 * x\n\n\ndef other(y):\n    return broken(",
    "fence in a docstring": '    """\n```\ndouble(2)\n```\n"""\n    return 2 * x\n\nprint(',
    "fenced": "```python\n    return 2 * x\n```\nThis doubles.",
    "first line without its indent": "return 2 * x\n",
    "one space short": "   y = x\n    return 2 * y\n",
    "tab": "\treturn 2 * x\n",
    "blank lines first": "\n\n    return 2 * x\n\nprint(",
    "comment first": "\n# twice\n    return 2 * x\n",
    "helper below with its import": "    return g(x)\n\nimport operator\n\ndef g(y):\n    return operator.mul(2, y)\n",
    "constant below": "    return TWO * x\n\nTWO = 2\n",
    "helper below with a decorator": "    return g(x)\n\n@staticmethod\ndef g(y):\n    return 2 * y\n\nprint(",
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completion(name: str) -> None:
    program = program_from_completion(PROMPT, COMPLETIONS[name], "double")
    assert program.startswith(PROMPT.rstrip())
    assert run(program)(21) == 42


def test_wrong_completions_stay_wrong() -> None:
    assert run(program_from_completion(PROMPT, "    return 3 * x\n", "double"))(1) == 3
    assert run(program_from_completion(PROMPT, "", "double"))(1) is None
    with pytest.raises(SyntaxError):
        run(program_from_completion(PROMPT, "    return (", "double"))


def test_stop_is_before_the_line() -> None:
    assert stop_at_end_of_function("    return 1\n\ndef f():") == "    return 1\n"
    assert stop_at_end_of_function("    return 1") == "    return 1"


CHATS = {
    "fence": f"Here it is:\n```python\n{FULL}```\nIt doubles.",
    "fence with prompt repeated": f"```python\n{PROMPT}    return 2 * x\n```",
    "no language": f"```\n{FULL}```",
    "upper-case language": f"```Python\n{FULL}```",
    "tildes": f"~~~python\n{FULL}~~~",
    "four ticks": f"````python\n{FULL}````",
    "unclosed fence": f"Sure!\n```python\n{FULL}",
    "body in a fence": "The body is\n```python\n    return 2 * x\n```",
    "body in a fence, not indented": "```python\nif x is None:\n    return 0\nreturn 2 * x\n```",
    "body, first line stripped": "```python\ny = x\n    return 2 * y\n```",
    "body below blank lines": "```python\n \n   \n    y = x\n    return 2 * y\n   \n```",
    "body with tabs": "```python\n\ty = x\n\treturn 2 * y\n```",
    "bare body": "    return 2 * x",
    "bare body, stripped": "return 2 * x",
    "bare function": FULL,
    "bare function in prose": f"Of course.\n\n{FULL}\nThis works because 2 * x is twice x.",
    "bare, import above": f"Of course.\n\nimport math\n\n{FULL}\nThat's it!",
    "test after": f"```python\n{FULL}```\nTry it:\n```python\nprint(double(2))\n```",
    "test before": f"```python\nassert double(2) == 4\n```\nPasses with\n```python\n{FULL}```",
    "shell block": f"```bash\npip install x\n```\n```python\n{FULL}```",
    "wrong language name": f"```py3\n{FULL}```",
    "labelled as text": f"```text\n{FULL}```",
    "corrected answer is last": f"```python\ndef double(x):\n    return x\n```\nWait, no:\n```python\n{FULL}```",
    "helper in another block": "```python\ndef two():\n    return 2\n```\nand\n"
    "```python\ndef double(x):\n    return two() * x\n```",
    "example in the answer's block": f"```python\n{FULL}\nassert double(2) == 4\n```",
    "thoughts": f"<think>Maybe\n```python\ndef double(x): return x\n```\n</think>\n```python\n{FULL}```",
    "thoughts without opening tag": f"hmm ```x``` so\n</think>\n\n```python\n{FULL}```",
    "windows lines": f"```python\n{FULL}```".replace("\n", "\r\n"),
    "indented fence": "1. Do\n\n   ```python\ndef double(x):\n    return 2 * x\n   ```",
    "special token": f"```python\n{FULL}```<|im_end|>",
    "lambda": "```python\ndouble = lambda x: 2 * x\n```",
    "future import": f"```python\nfrom __future__ import annotations\n{FULL}```",
    "class above": f"```python\nclass A:\n    pass\n\n{FULL}```",
}


@pytest.mark.parametrize("prompt", [PROMPT, WITH_IMPORT], ids=["plain", "imports"])
@pytest.mark.parametrize("name", CHATS)
def test_chat(name: str, prompt: str) -> None:
    assert run(program_from_chat(CHATS[name], prompt, "double"))(21) == 42


def test_chat_answer_may_use_what_the_prompt_defines() -> None:
    body = "    v: List = [helper(x)]\n    return math.floor(v[0])\n"
    reply = f"```python\ndef double(x: int) -> int:\n{body}```"
    assert run(program_from_chat(reply, WITH_IMPORT, "double"))(3) == 6


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I cannot help with that.",
        "<think>still thinking ```python\ndef double(x):\n    return 2 * x\n```",
        "```python\ndef triple(x):\n    return 3 * x\n```",
        "```python\n```",
        "The answer = 42.",
    ],
)
def test_chat_without_an_answer_defines_nothing(reply: str) -> None:
    with pytest.raises((SyntaxError, KeyError)):
        run(program_from_chat(reply, PROMPT, "double"))


def test_broken_code_is_shown_as_it_was() -> None:
    program = program_from_chat("```python\ndef double(x):\n    return (2 * x\n```", PROMPT, "double")
    assert "return (2 * x" in program


def test_long_prose_is_fast() -> None:
    reply = "\n".join(["def double(x):", "    return 2 * x", *["import this, please? def x"] * 3000])
    assert run(program_from_chat(reply, PROMPT, "double"))(1) == 2


# --- other shapes of answers ---

MORE_CHATS = {
    "thoughts in two parts": "<think>a</think>no\n<think>```python\ndef double(x): return x\n```</think>\n"
    f"```python\n{FULL}```",
    "reasoning tag": f"<reasoning>\n```\ndef double(x): return 0\n```\n</reasoning>\n{FULL}",
    "indented with tabs": "```python\ndef double(x):\n\tif x:\n\t\treturn 2 * x\n\treturn 0\n```",
    "tabs and windows lines": "```python\r\ndef double(x):\r\n\treturn 2 * x\r\n```\r\n",
    "prompt and signature repeated": f"{PROMPT}    return 2 * x\n\nThe answer:\n```python\n{FULL}```",
    "fence inside a list": "- Step 1\n- Step 2:\n  ```python\n  def double(x):\n      return 2 * x\n  ```\nor\n"
    f"```python\n{FULL}```",
    "console session": f"```pycon\n>>> double(2)\n4\n```\n```python\n{FULL}```",
    "output below": f"```python\n{FULL}```\nOutput:\n```\n4\n```",
    "two unclosed fences": f"```text\nplan\n```\n```python\n{FULL}",
    "main guard that asks": f"```python\n{FULL}\nif __name__ == '__main__':\n    double(int(input()))\n```",
    "async helper": f"```python\nasync def g():\n    pass\n\n{FULL}```",
    "type hints from nowhere": "```python\nfrom __future__ import annotations\ndef double(x: Foo) -> Bar:\n"
    "    return 2 * x\n```",
    "language with attributes": f"```python title=answer.py\n{FULL}```",
    "no newline at the end of the fence": f"```python\n{FULL.rstrip()}\n```",
    "special tokens around": f"<|im_start|>assistant\n```python\n{FULL}```<|im_end|><|endoftext|>",
    "full-width tokens": f"```python\n{FULL}```<\uff5cend\u2581of\u2581sentence\uff5c>",
}

WRONG = "def double(x):\n    return x\n"
MORE_CHATS |= {
    "imports in a block above": "```python\nimport operator\n```\n```python\ndef double(x):\n"
    "    return operator.mul(2, x)\n```",
    "imports in a block below": "```python\ndef double(x):\n    return operator.mul(2, x)\n```\nand\n"
    "```python\nimport operator\n```",
    "from and as": "```python\nfrom operator import mul as times\n```\n```python\ndef double(x):\n"
    "    return times(2, x)\n```",
    "a star": "```python\nfrom operator import *\n```\n```python\ndef double(x):\n    return mul(2, x)\n```",
    "a constant above": "```python\nTWO = 2\n```\n```python\ndef double(x):\n    return TWO * x\n```",
    "a helper that needs an import": "```python\nimport operator\n```\n```py\ndef g(x):\n"
    "    return operator.mul(2, x)\n```\n```python3\ndef double(x):\n    return g(x)\n```",
    "a helper of the first attempt": "```python\nimport operator\ndef g(x):\n    return operator.mul(2, x)\n"
    f"{WRONG}```\nCorrected:\n```python\ndef double(x):\n    return g(x)\n```",
    "a correction, then its use": f"```python\n{WRONG}```\nNo:\n```python\n{FULL}```\n```python\nprint(double(2))\n```",
    "a correction that is cut short": f"```python\n{FULL}```\nShorter:\n```python\ndef double(x):\n    return (2",
    "the header once more": f"```python\n{FULL}```\nIts header:\n```python\ndef double(x: int) -> int: ...\n```",
    "fence in the docstring": '```python\ndef double(x):\n    """Twice.\n\n    ```\n    double(2)\n    ```\n    """\n'
    "    return 2 * x\n```\nDone.",
    "named fence in the docstring": '```python\ndef double(x):\n    """Twice.\n\n```python\ndouble(2)\n```\n"""\n'
    "    return 2 * x\n```\nDone.",
    "four ticks around three": f"````markdown\n```python\n{FULL}```\n````",
    "Python 3": f"```Python 3\n{FULL}```",
    "file name": f"```python:answer.py\n{FULL}```",
    "behind text": f"Sure: ```python\n{FULL}```",
    "in a numbered list": "1. ```python\n   def double(x):\n       return 2 * x\n   ```",
    "unclosed correction": f"```python\n{WRONG}```\nFixed:\n```python\n{FULL}",
}


@pytest.mark.parametrize("name", MORE_CHATS)
def test_more_chats(name: str) -> None:
    assert run(program_from_chat(MORE_CHATS[name], PROMPT, "double"))(21) == 42


@pytest.mark.parametrize(
    "reply",
    [
        "```python\ndef twice(x):\n    return 2 * x\n```",
        "```python\nclass Solution:\n    def double(self, x):\n        return 2 * x\n```",
    ],
)
def test_an_answer_under_another_name_is_none(reply: str) -> None:
    with pytest.raises(KeyError):
        run(program_from_chat(reply, PROMPT, "double"))


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("a\nprint(1)", ("\nprint(", "\nclass"), "a"),
        ("a\nclass B\nprint(1)", ("\nprint(", "\nclass"), "a"),
        ("a\r\nprint(1)", ("\nprint(",), "a"),
        ("no stop", ("\nprint(",), "no stop"),
        ("all", (), "all"),
        ("### no", ("###",), ""),
    ],
)
def test_cut_at_the_first_stop(text: str, stops: tuple[str, ...], left: str) -> None:
    assert cut(text, stops) == left


@pytest.mark.parametrize(
    ("reply", "block"),
    [
        ("```python\na\n```\ntext\n```\nb\n```", "b\n"),
        ("<think>```\nx\n```</think>```python\na\n```", "a\n"),
        ("```python\na", "a"),
        ("```python\na\n```\n```\n```", "a\n"),
        ("~~~\na ``` b\n~~~", "a ``` b\n"),
        ("no code", None),
        ("<think>```\nx\n```", None),
    ],
)
def test_last_block(reply: str, block: str | None) -> None:
    assert last_block(reply) == block


def test_no_engine_stops_before_a_correction() -> None:
    other = FULL.replace("return", "return 7 +")
    whole = f"Here:\n```python\n{other}```\nNo, it must not add. Corrected:\n```python\n{FULL}```\n"
    problem = Problem(task_id="t", prompt=PROMPT, entry_point="double", canonical_solution="", test="pass")
    assert not any(finished(whole[:n], "chat", problem) for n in range(len(whole)))
    assert "7 +" not in program(problem, whole, "chat")


def test_examples_are_left_out() -> None:
    program = f"import math\nTWO = 2\n{FULL}assert double(1) == 3\nprint(double(2))\n"
    program += "if __name__ == '__main__':\n    input()\n"
    assert without_examples(program) == f"import math\nTWO = 2\n\n{FULL}"
    assert without_examples(FULL) == FULL
    assert without_examples("def (") == "def ("


JS_PROMPT = "//Twice x.\nfunction double(x){\n"
JS = "function double(x) {\n  return 2 * x;\n}\n"
JAVASCRIPT = {
    "fence": (f"Sure:\n```javascript\n{JS}```\nDone.", JS),
    "js": (f"```js\n{JS}```", JS),
    "no language": (f"```\n{JS}```", JS),
    "unclosed": (f"```javascript\n{JS}", JS),
    "windows lines": (f"```js\n{JS}```".replace("\n", "\r\n"), JS),
    "arrow": ("```js\nconst double = (x) => 2 * x;\n```", "const double = (x) => 2 * x;\n"),
    "last wins": (f"```js\nfunction double(x) {{ return x; }}\n```\nNo:\n```js\n{JS}```", JS),
    "test block after": (f"```js\n{JS}```\n```js\nconsole.log(double(2));\n```", JS),
    "shell block": (f"```bash\nnode x.js\n```\n```js\n{JS}```", JS),
    "thoughts": (f"<think>```js\nfunction double(x) {{}}\n```</think>\n```js\n{JS}```", JS),
    "exported": (f"```js\nexport default {JS}```", JS),
    "body": ("```js\n  return 2 * x;\n}\n```", JS_PROMPT + "  return 2 * x;\n}\n"),
    "body without its end": ("```js\n  return 2 * x;\n```", JS_PROMPT + "  return 2 * x;\n}\n"),
    "bare": (f"Here you go.\n\n{JS}\nIt doubles x.", JS),
    "helper in another block": (
        "```js\nfunction two() { return 2; }\n```\n```js\nfunction double(x) { return two() * x; }\n```",
        "function two() { return 2; }\nfunction double(x) { return two() * x; }\n",
    ),
    "imports apart": (
        "```js\nimport { max as m } from 'x';\n```\n"
        "```js\nfunction double(x) { return m(x); }\nexport { double };\n```",
        "const { max : m } = require('x');\nfunction double(x) { return m(x); }\n\n",
    ),
    "constant apart": (
        "```js\nconst TWO = 2;\n```\n```js\nconst double = (x) => TWO * x;\n```",
        "const TWO = 2;\nconst double = (x) => TWO * x;\n",
    ),
    "no answer": ("I cannot.", "// no code in the reply\n"),
    "another name": ("```js\nconst double_it = 1;\n```", "const double_it = 1;\n"),
}


@pytest.mark.parametrize("name", JAVASCRIPT)
def test_javascript(name: str) -> None:
    reply, program = JAVASCRIPT[name]
    assert program_from_javascript_chat(reply, JS_PROMPT, "double") == program


def test_windows_line_ends_do_not_end_an_answer() -> None:
    assert not finished("    x = 1\r\n    return x", "completion")
    assert finished("    x = 1\r\n    return x\r\nprint(x)", "completion")


@pytest.mark.parametrize("indent", ["  ", "   ", "\t"])
def test_a_block_inside_a_list_is_moved_to_the_margin(indent: str) -> None:
    lines = ["```python", "def f(x):", "    if x:", "", "        return x", "    return 0", "```"]
    reply = "1. Like this:\n\n" + "\n".join(indent + line if line else "" for line in lines) + "\n\n2. Done.\n"
    made = program_from_chat(reply, 'def f(x):\n    """Double."""\n', "f")
    assert made.strip() == "def f(x):\n    if x:\n\n        return x\n    return 0"


def test_only_the_indent_of_the_fence_is_taken() -> None:
    """A body may be indented in a block that is not."""
    assert fenced("```\n    return 1\n```\n")[0][1] == "    return 1\n"
    assert fenced("  ```\n    return 1\nx\n  ```\n")[0][1] == "  return 1\nx\n"


def test_a_completion_goes_on_until_the_helpers_it_calls_are_there() -> None:
    problem = Problem(task_id="t", prompt=PROMPT, entry_point="double", canonical_solution="", test="pass")
    helped = "    return twice(x)\n\n\ndef twice(y):\n    return 2 * y\n\n\ndef junk(z):\n    return z\n"
    for text in (helped, "    return 2 * x\n\n\ndef junk(z):\n    return z\n"):
        seen = next(text[:n] for n in range(len(text)) if finished(text[:n], "completion", problem))
        assert run(program(problem, seen, "completion"))(21) == 42
        assert "return z" not in seen
    assert finished("    return lost(x)\n\nif __name__ == '__main__':\n", "completion", problem)
    assert not finished(PROMPT[:20], "completion", problem)


RIGHT = "def f(x):\n    return 2 * x\n"
WRONG = "def f(x):\n    return 3 * x\n"
NOT_YET = "def f(x):\n    raise NotImplementedError\n"
TRIED = "try:\n    from fast import f\nexcept ImportError:\n    def f(x):\n        return 2 * x\n"
HABITS = {
    "closed behind the last line": f"```python\n{RIGHT.rstrip()}```\nIt doubles.",
    "closed so, then another": f"```python\n{WRONG.rstrip()}```\nCorrected:\n```python\n{RIGHT}```\n",
    "closed, never opened": f"{RIGHT}```\nIt doubles.",
    "indented as Markdown has it": "Here:\n\n    def f(x):\n        return 2 * x\n\nIt doubles.",
    "bare, then its use in a fence": f"{RIGHT}\nUse it:\n```python\nresult = f(1)\n```\n",
    "a stub that raises comes last": f"```python\n{RIGHT}```\nTo do:\n```python\n{NOT_YET}```\n",
    "under a condition": "```python\nif True:\n    def f(x):\n        return 2 * x\n```\n",
    "under try": f"```python\n{TRIED}```\n",
    "the turn's end written out": f"```python\n{RIGHT}```\n<|im_end|>\n<|im_start|>user\nNo.\n```python\n{WRONG}```\n",
    "the end of text written out": f"```python\n{RIGHT}```<|endoftext|>```python\n{WRONG}```\n",
    "a byte order mark": f"\ufeff{RIGHT}",
    "a tag that looks like a token": "```python\ndef f(x):\n    return len('</s>') // 2 * x\n```\n",
    "a fence in a comment": "```python\ndef f(x):\n    # see ```a```\n    return 2 * x\n```\n",
}


@pytest.mark.parametrize("reply", HABITS.values(), ids=HABITS.keys())
def test_habits_of_chat_models(reply: str) -> None:
    space: dict[str, Any] = {}
    exec(program_from_chat(reply, 'def f(x):\n    """Twice x."""\n', "f"), space)
    assert space["f"](21) == 42
