"""From what a model wrote to the program that is judged. Pure functions; nothing here runs code.

Completion: the text is cut where it leaves the function, at the stop sequences published with HumanEval
(Chen et al. 2021, section 2.2: ``\\nclass``, ``\\ndef``, ``\\n#``, ``\\nif``, ``\\nprint``), widened by those
that later harnesses add (decorators, asserts, fences). Chat: the answer is looked for in fenced blocks first,
then in the bare text.
"""

import ast
import re
import warnings
from collections.abc import Sequence

from qtool.evaluate.tasks.reply import SPECIAL, fenced, newlines, without_thoughts
from qtool.evaluate.tasks.syntax import functions, inside_literal, missing, names, needed, parses, stars

# A line at column 0 that begins with one of these is no longer the body of the function asked for.
_STOP = re.compile(
    r"\n(?=class\s|def\s|async\s+def\s|#|if\s|if\(|print\s*\(|assert\b|@|```|~~~"
    r"|from\s+\S+\s+import\b|import\s|<\||</?s>|<file_sep>|\"\"\"|'''|for\s|while\s|try:|with\s|>>>)"
)
_PYTHON_WORDS = re.compile(r"[{.\s]*(?:ipython|python|py)?(?![a-z])")
# A continuation that goes on with one of these at column 0 writes no more helpers.
_DONE = re.compile(r"\n(?:if\s|if\(|print\s*\(|assert\b|```|~~~|<\||</?s>|<file_sep>|\"\"\"|'''|for\s|while\s|>>>)")
_FUTURE = re.compile(r"^from\s+__future__\s+import\s+[\w, ]+$", re.MULTILINE)
_CODE_LINE = re.compile(r"(?:def|async\s+def|class|import|from\s+\S+\s+import|@\w)\b")


def stop_at_end_of_function(completion: str, prompt: str = "") -> str:
    """``completion`` of ``prompt`` up to the first line at column 0 that starts something else.

    Lines inside brackets or triple-quoted strings may sit at column 0 too: a cut there would break a good
    answer, so a stop counts only outside them, and only below something.
    """
    text = newlines(completion)
    for match in _STOP.finditer(text):
        before = text[: match.start()]
        if before.strip() and not inside_literal(prompt + before):
            return before
    return text


def completed(prompt: str, completion: str, entry_point: str) -> bool:
    """Whether nothing that follows can still belong to the answer: the function has ended, and so have the helpers
    below it that it calls."""
    text = newlines(completion)
    if prompt.startswith(text.lstrip()):
        return False  # it is repeating the prompt
    text = without_prompt(prompt, text)
    body = stop_at_end_of_function(text, prompt)
    tail = text[len(body) :]
    if not tail.strip("\n"):
        return False
    program = prompt + body
    if parses(program) is None or _DONE.search(tail) or not (lacking := missing(program)):
        return True
    last = tail.rfind("\n", 0, max((m.start() for m in _STOP.finditer(tail)), default=0) + 1)
    found = "\n\n".join(_called_helpers(program, tail[: max(last, 0)], entry_point))
    return bool(found) and not lacking & missing(program + "\n" + found)


def without_prompt(prompt: str, text: str) -> str:
    """``text`` without the prompt that some models write once more before they go on."""
    begun = text.lstrip()
    return begun[len(prompt.rstrip()) :].lstrip("\n") if begun.startswith(prompt.rstrip()) else text


def program_from_completion(problem_prompt: str, completion: str, entry_point: str) -> str:
    """The program that a base model's continuation of ``problem_prompt`` makes.

    The prompt always comes first, as in the published harness. A helper function written BELOW the answer at
    column 0 is kept if the answer calls it by name: HumanEval's plain cut turns that into a NameError.
    """
    text = without_prompt(problem_prompt, newlines(SPECIAL.split(completion, maxsplit=1)[0]))
    if re.match(r"\s*(?:```|~~~)", text):
        return program_from_chat(text, problem_prompt, entry_point)
    body = stop_at_end_of_function(text, problem_prompt)
    program = problem_prompt + body
    tail = text[len(body) :]
    if parses(program) is None or re.match(r"\n*return\b", body):
        begun = body.strip("\n")
        if entry_point in functions(begun):  # the whole function, below a prompt that is none without its body
            program = _preamble(problem_prompt, entry_point) + "\n\n" + begun
        elif begun.strip() and parses(_with_body(problem_prompt, begun)) is not None:
            program = _with_body(problem_prompt, begun)  # the indent of the first line went astray
    helpers = _called_helpers(program, tail, entry_point)
    return "\n\n".join([program.rstrip("\n"), *helpers]) + "\n"


def program_from_chat(reply: str, prompt: str, entry_point: str) -> str:
    """The program in a chat model's reply to "complete this function: <prompt>".

    Tried in order: the LAST fenced block that defines ``entry_point`` (with the helpers it calls from other
    blocks, and the prompt's imports), a fenced body, bare code in the text, a bare body.
    A reply without code gives a program that does not define the function: it fails like any wrong answer.
    """
    text = without_thoughts(reply)
    blocks = [(language, body) for language, body, _ in fenced(reply)]
    python = [body for language, body in blocks if _PYTHON_WORDS.match(language)]
    both = (python, [body for _, body in blocks])
    for sources in both:
        if (found := _answer(sources, entry_point)) is not None:
            return _whole_program(found, sources, prompt, entry_point)
    if (bare := _bare_code(text, entry_point) or _indented_code(text, entry_point)) is not None:
        return _whole_program(bare, [bare], prompt, entry_point)
    for body in [body for sources in both for body in sources] if blocks else [text]:
        if _is_body(prompt, body):
            return _with_body(prompt, body)
    # Nothing that defines the function: the longest block, so that the failure shows what was said.
    fallback = max(python or [body for _, body in blocks] or [text], key=len)
    return fallback.strip("\n") + "\n"


def cut(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of the stop sequences that occurs in it, line ends made ``\\n`` first."""
    text = newlines(text)
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def without_examples(program: str) -> str:
    """``program`` without what only shows or tries it at column 0: asserts, calls, a main guard (as EvalPlus does)."""
    tree = parses(program)
    if tree is None:
        return program

    def shows(node: ast.stmt) -> bool:
        guard = isinstance(node, ast.If) and "__name__" in names(node.test)
        return guard or isinstance(node, (ast.Assert, ast.Expr))

    if not any(shows(node) for node in tree.body):
        return program
    tree.body = [node for node in tree.body if not shows(node)]
    return ast.unparse(tree) + "\n"


def _defines(source: str, entry_point: str) -> bool:
    tree = parses(source)
    if tree is None:
        # Broken code still counts as the attempt if its text has the header.
        return re.search(rf"^(?:async\s+)?def\s+{entry_point}\s*\(", source, re.MULTILINE) is not None
    if entry_point in functions(source):
        return True
    guarded = [node for node in tree.body if isinstance(node, (ast.If, ast.Try))]
    if any(isinstance(each, ast.FunctionDef) and each.name == entry_point for g in guarded for each in ast.walk(g)):
        return True
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return any(isinstance(target, ast.Name) and target.id == entry_point for target in targets)


def _answer(sources: list[str], entry_point: str) -> str | None:
    """The last block that defines the function; one that is cut short or only shows its header stands back."""
    full = [body for body in sources if _defines(body, entry_point)]
    whole = [body for body in full if parses(body) is not None]
    real = [body for body in whole if not _is_stub(functions(body).get(entry_point))]
    methods = [body for body in sources if entry_point in _methods_of_solution(body)]
    return next((found[-1] for found in (real, whole, full, methods) if found), None)


def _is_stub(node: ast.stmt | None) -> bool:
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    return all(
        isinstance(each, ast.Pass)
        or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        or (isinstance(each, ast.Raise) and each.exc is not None and "NotImplementedError" in names(each.exc))
        for each in node.body
    )


def _methods_of_solution(source: str) -> set[str]:
    found = functions(source).get("Solution")
    inner = found.body if isinstance(found, ast.ClassDef) else []
    return {node.name for node in inner if isinstance(node, ast.FunctionDef)}


def _called_helpers(program: str, tail: str, entry_point: str) -> list[str]:
    """Source of what ``program`` needs of ``tail``, transitively; none if it does not parse."""
    if parses(program) is None:
        return []
    lines = tail.split("\n")
    # A continuation is often cut in the middle: drop lines from the end until the rest parses.
    while lines and parses("\n".join(lines)) is None:
        lines.pop()
    return needed(program, ["\n".join(lines)], entry_point)


def _whole_program(code: str, blocks: list[str], prompt: str, entry_point: str) -> str:
    """``code`` plus what it needs: imports and helpers of the prompt and of the reply's other blocks."""
    code = code.strip("\n") + "\n"
    others = [body for body in blocks if body.strip() != code.strip()]
    preamble = _preamble(prompt, entry_point)
    above = needed(f"{preamble}\n{code}", others, entry_point)
    if (all_names := stars(others)) and missing("\n".join([preamble, *above, code])):
        above = [*all_names, *above]
    # `from __future__` must stay on top of whatever is put above the answer.
    future = [match[0] for match in _FUTURE.finditer(code)]
    return "\n\n".join(part for part in [*future, preamble, *above, _FUTURE.sub("", code)] if part)


def _preamble(prompt: str, entry_point: str) -> str:
    """What stands above the function asked for in the prompt: imports, and helper functions it may use."""
    header = re.search(rf"^(?:async\s+)?def\s+{entry_point}\s*\(", prompt, re.MULTILINE)
    above = prompt[: header.start()].rstrip() if header else ""
    return above if parses(above) is not None else ""


def _with_body(prompt: str, body: str) -> str:
    return prompt.rstrip("\n") + "\n" + _indented(body) + "\n"


def _is_body(prompt: str, text: str) -> bool:
    """Whether ``text`` is the missing body: it parses below the prompt, and is more than prose."""
    if not text.strip() or not re.search(r"\breturn\b|\byield\b|\braise\b|=", text):
        return False
    return parses(_with_body(prompt, text)) is not None


def _indented(body: str) -> str:
    """``body`` four columns in. A first line that lost its indent (stripped reply) is put back in step."""
    lines = body.rstrip().expandtabs(4).split("\n")
    while not lines[0].strip():
        lines.pop(0)
    rest = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    first = len(lines[0]) - len(lines[0].lstrip())
    if first < 4 and rest and min(rest) >= 4 and (first == 0 or not lines[0].rstrip().endswith(":")):
        lines[0] = " " * min(rest) + lines[0].lstrip()
        first = min(rest)
    margin = min([first, *rest])
    return "\n".join("    " + line[margin:] if line.strip() else "" for line in lines)


def _bare_code(text: str, entry_point: str) -> str | None:
    """The longest run of lines that parses and defines the function, in a reply without fences."""
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if _CODE_LINE.match(line)]
    header = re.compile(rf"(?:async\s+)?def\s+{entry_point}\s*\(")
    if not any(header.match(lines[i]) for i in starts):
        return None
    for start in starts:
        # Longest first: prose below the code does not parse and is dropped from the line that is at fault.
        end = len(lines)
        while end > start:
            block = "\n".join(lines[start:end])
            if parses(block) is not None:
                if entry_point in functions(block):
                    return block
                break
            end = min(end - 1, start + _faulty_line(block) - 1)
    first = next(i for i in starts if header.match(lines[i]))
    return "\n".join(lines[first:])


def _indented_code(text: str, entry_point: str) -> str | None:
    """A block of code that Markdown marks by four columns."""
    return (
        None
        if re.search(r"^class\s", text, re.MULTILINE)
        else _bare_code(re.sub(r"^(?: {4}|\t)", "", text, flags=re.MULTILINE), entry_point)
    )


def _faulty_line(source: str) -> int:
    """1-based number of the line at which ``source`` stops being Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):
        return 1
    return source.count("\n") + 1
