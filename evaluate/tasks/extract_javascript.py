"""From a chat model's reply to the JavaScript program that is judged. Pure; nothing here runs code."""

import re

from qtool.evaluate.tasks.reply import fenced, without_thoughts

_WORDS = frozenset({"", "javascript", "js", "node", "nodejs", "mjs", "jsx", "ecmascript"})
_EXPORT = re.compile(r"^export\s+(?:default\s+)?(?=(?:async\s+)?function|const|let|var|class)", re.MULTILINE)
_EXPORTED = re.compile(r"^export\s+(?:default\s+[\w$]+|\{[^}]*\})[ \t]*;?[ \t]*$", re.MULTILINE)
_IMPORT = re.compile(
    r"^import\s+(?:(?P<all>\*\s+as\s+[\w$]+)|(?P<one>[\w$]+)|(?P<some>\{[^}]*\}))"
    r"\s+from\s+(?P<module>['\"][^'\"]+['\"])[ \t]*;?",
    re.MULTILINE,
)
_DECLARED = re.compile(r"\b(?:function\s*\*?|class|const|let|var)\s+([\w$]+)")
_DECLARED_AT_TOP = re.compile(r"^(?:async\s+)?(?:function\s*\*?|class|const|let|var)\s+([\w$]+)", re.MULTILINE)
_UNPACKED = re.compile(r"^(?:const|let|var)\s*\{([^}]*)\}", re.MULTILINE)
_NAME = re.compile(r"[\w$]+")


def program_from_javascript_chat(reply: str, prompt: str, entry_point: str) -> str:
    """The program in a reply to "complete this function: <prompt>".

    Tried in order: the LAST fenced block that defines ``entry_point``, a fenced body (put below the prompt), bare code
    in the text. A reply without code gives a program that does not define the function.
    """
    header = re.compile(
        rf"(?:\bfunction\s*\*?\s+|\b(?:const|let|var|class)\s+){re.escape(entry_point)}(?![\w$])"
        rf"|^{re.escape(entry_point)}\s*=",
        re.MULTILINE,
    )
    blocks = [(language.split(" ")[0], body) for language, body, _ in fenced(reply)]
    ours = [body for language, body in blocks if language in _WORDS]
    for bodies in (ours, [body for _, body in blocks]):
        if defining := [body for body in bodies if header.search(body)]:
            return _plain(_with_helpers(defining[-1], bodies, header))
    if bodies := [body for body in ours if "return" in body]:
        program = f"{prompt.rstrip()}\n{bodies[-1].rstrip()}\n"
        return program if program.count("{") <= program.count("}") else program + "}\n"
    text = without_thoughts(reply)
    if not blocks and (found := header.search(text)):
        start = text.rfind("\n", 0, found.start()) + 1
        lines = text[start:].split("\n")
        # Prose below the code is not part of it: the last line that closes a block is the end.
        last = max((i for i, line in enumerate(lines) if line.startswith(("}", ")"))), default=len(lines) - 1)
        return _plain("\n".join(lines[: last + 1]) + "\n")
    return (blocks[-1][1].rstrip("\n") if blocks else "// no code in the reply") + "\n"


def _with_helpers(code: str, bodies: list[str], header: re.Pattern[str]) -> str:
    """``code`` below the blocks that define what it names."""
    helpers: list[str] = []
    wanted = code
    for body in reversed(bodies):
        groups = [*_UNPACKED.findall(body), *(m["some"] or m["one"] or m["all"] for m in _IMPORT.finditer(body))]
        names = {*_DECLARED_AT_TOP.findall(body), *_NAME.findall(" ".join(groups))} - set(_DECLARED.findall(code))
        lacks = any(re.search(rf"(?<![\w$.]){re.escape(name)}(?![\w$])", wanted) for name in names)
        # An earlier attempt may hold helpers of the last: two functions of one name do not clash.
        twice = header.search(body) and not (_declares(body, header) and _declares(code, header))
        if body != code and lacks and not twice:
            helpers.insert(0, body.rstrip("\n"))
            wanted += body
    return "\n".join([*helpers, code.rstrip("\n")]) + "\n"


def _declares(code: str, header: re.Pattern[str]) -> bool:
    found = header.search(code)
    return found is not None and found[0].startswith("function")


def _plain(code: str) -> str:
    """Without the module syntax that a script cannot have."""
    return _EXPORT.sub("", _EXPORTED.sub("", _IMPORT.sub(_required, code)))


def _required(statement: re.Match[str]) -> str:
    if statement["some"]:
        names = re.sub(r"\bas\b", ":", statement["some"])
        return f"const {names} = require({statement['module']});"
    return f"const {statement['one'] or statement['all'].split()[-1]} = require({statement['module']});"
