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

from qtool.evaluate.reply import SPECIAL, fenced, newlines, without_thoughts

# A line at column 0 that begins with one of these is no longer the body of the function asked for.
_STOP = re.compile(
    r"\n(?=class\s|def\s|async\s+def\s|#|if\s|if\(|print\s*\(|assert\b|@|```|~~~"
    r"|from\s+\S+\s+import\b|import\s|<\||</?s>|<file_sep>|\"\"\"|'''|for\s|while\s|try:|with\s|>>>)"
)
_PYTHON_WORDS = frozenset({"", "python", "python3", "py", "py3", "{python}", "{.python}", "python3.11"})
_FUTURE = re.compile(r"^from\s+__future__\s+import\s+[\w, ]+$", re.MULTILINE)
_CODE_LINE = re.compile(r"(?:def|async\s+def|class|import|from\s+\S+\s+import|@\w)\b")


def stop_at_end_of_function(completion: str) -> str:
    """``completion`` up to the first line at column 0 that starts something else.

    Lines inside brackets or triple-quoted strings may sit at column 0 too: a cut there would break a good
    answer, so a stop counts only outside them.
    """
    text = newlines(completion)
    for match in _STOP.finditer(text):
        if not _inside_literal(text[: match.start()]):
            return text[: match.start()]
    return text


def program_from_completion(problem_prompt: str, completion: str, entry_point: str) -> str:
    """The program that a base model's continuation of ``problem_prompt`` makes.

    The prompt always comes first, as in the published harness. A helper function written BELOW the answer at
    column 0 is kept if the answer calls it by name: HumanEval's plain cut turns that into a NameError.
    """
    text = newlines(SPECIAL.split(completion, maxsplit=1)[0])
    body = stop_at_end_of_function(text)
    program = problem_prompt + body
    tail = text[len(body) :]
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
    python = [body for language, body in blocks if language.split(" ")[0] in _PYTHON_WORDS]
    for sources in (python, [body for _, body in blocks]):
        full = [body for body in sources if _defines(body, entry_point)]
        if full:
            return _whole_program(full[-1], sources, prompt, entry_point)
        for body in sources:
            if _is_body(prompt, body):
                return _with_body(prompt, body)
    if not blocks:
        bare = _bare_code(text, entry_point)
        if bare is not None:
            return _whole_program(bare, [bare], prompt, entry_point)
        if _is_body(prompt, text):
            return _with_body(prompt, text)
    # Nothing that defines the function: the longest block, so that the failure shows what was said.
    fallback = max(python or [body for _, body in blocks] or [text], key=len)
    return fallback.strip("\n") + "\n"


def cut(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of the stop sequences that occurs in it, line ends made ``\\n`` first."""
    text = newlines(text)
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def without_examples(program: str) -> str:
    """``program`` without what only shows or tries it at column 0: asserts, calls, a main guard (as EvalPlus does)."""
    tree = _parses(program)
    if tree is None:
        return program

    def shows(node: ast.stmt) -> bool:
        guard = isinstance(node, ast.If) and "__name__" in _names(node.test)
        return guard or isinstance(node, (ast.Assert, ast.Expr))

    if not any(shows(node) for node in tree.body):
        return program
    tree.body = [node for node in tree.body if not shows(node)]
    return ast.unparse(tree) + "\n"


def _parses(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            # A model's "\\d" in a plain string is its own business: no warning on our stderr.
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _inside_literal(before: str) -> bool:
    """Whether ``before`` ends inside an open triple-quoted string or bracket."""
    depth, index = 0, 0
    while index < len(before):
        character = before[index]
        if character == "#":
            end = before.find("\n", index)
            index = len(before) if end < 0 else end
        elif character in "\"'":
            quote = character * 3 if before.startswith(character * 3, index) else character
            index += len(quote)
            while not before.startswith(quote, index):
                if index >= len(before):
                    return len(quote) == 3
                if before[index] == "\n" and len(quote) == 1:
                    break
                index += 2 if before[index] == "\\" else 1
            index += len(quote) - 1
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
        index += 1
    return depth > 0


def _functions(source: str) -> dict[str, ast.stmt]:
    tree = _parses(source)
    if tree is None:
        return {}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name: node for node in tree.body if isinstance(node, kinds)}


def _defines(source: str, entry_point: str) -> bool:
    tree = _parses(source)
    if tree is None:
        # Broken code still counts as the attempt if its text has the header.
        return re.search(rf"^(?:async\s+)?def\s+{entry_point}\s*\(", source, re.MULTILINE) is not None
    if entry_point in _functions(source):
        return True
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return any(isinstance(target, ast.Name) and target.id == entry_point for target in targets)


def _names(source: str | ast.AST) -> set[str]:
    tree = _parses(source) if isinstance(source, str) else source
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} if tree else set()


def _called_helpers(program: str, tail: str, entry_point: str) -> list[str]:
    """Source of the functions in ``tail`` that ``program`` needs, transitively; none if it does not parse."""
    if _parses(program) is None:
        return []
    lines = tail.split("\n")
    known = set(_functions(program))
    # A continuation is often cut in the middle: drop lines from the end until the rest parses.
    while lines and _parses("\n".join(lines)) is None:
        lines.pop()
    available = {
        name: node for name, node in _functions("\n".join(lines)).items() if name not in known | {entry_point}
    }
    wanted, found = _names(program), []
    while fresh := [name for name in available if name in wanted]:
        for name in fresh:
            node = available.pop(name)
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            found.append("\n".join(lines[first - 1 : node.end_lineno]))
            wanted |= _names(node)
    return found


def _whole_program(code: str, blocks: list[str], prompt: str, entry_point: str) -> str:
    """``code`` plus what it needs: imports and helpers of the prompt, helpers in the reply's other blocks."""
    code = code.strip("\n") + "\n"
    others = [body for body in blocks if body.strip() != code.strip() and not _defines(body, entry_point)]
    needed = _names(code) - set(_functions(code))
    helpers = [body.strip("\n") for body in others if needed & set(_functions(body))]
    preamble = _preamble(prompt, entry_point)
    # `from __future__` must stay on top of whatever is put above the answer.
    future = [match[0] for match in _FUTURE.finditer(code)]
    return "\n\n".join(part for part in [*future, preamble, *helpers, _FUTURE.sub("", code)] if part)


def _preamble(prompt: str, entry_point: str) -> str:
    """What stands above the function asked for in the prompt: imports, and helper functions it may use."""
    header = re.search(rf"^(?:async\s+)?def\s+{entry_point}\s*\(", prompt, re.MULTILINE)
    above = prompt[: header.start()].rstrip() if header else ""
    return above if _parses(above) is not None else ""


def _with_body(prompt: str, body: str) -> str:
    return prompt.rstrip("\n") + "\n" + _indented(body) + "\n"


def _is_body(prompt: str, text: str) -> bool:
    """Whether ``text`` is the missing body: it parses below the prompt, and is more than prose."""
    if not text.strip() or not re.search(r"\breturn\b|\byield\b|\braise\b|=", text):
        return False
    return _parses(_with_body(prompt, text)) is not None


def _indented(body: str) -> str:
    """``body`` four columns in. A first line that lost its indent (stripped reply) is put back in step."""
    lines = body.rstrip().expandtabs(4).split("\n")
    while not lines[0].strip():
        lines.pop(0)
    rest = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    first = len(lines[0]) - len(lines[0].lstrip())
    if first == 0 and rest and min(rest) >= 4:
        lines[0] = " " * min(rest) + lines[0]
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
            if _parses(block) is not None:
                if entry_point in _functions(block):
                    return block
                break
            end = min(end - 1, start + _faulty_line(block) - 1)
    first = next(i for i in starts if header.match(lines[i]))
    return "\n".join(lines[first:])


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
