"""The parts of a chat model's reply: its thoughts, its fenced blocks, the text. Pure functions."""

import ast
import re
import warnings
from collections.abc import Iterator

# An opening fence: at the margin or indented, behind the mark of a list, or (if it names a language) behind any text.
_OPENS = re.compile(
    r"^(?P<before>[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?|[^\n`~]*[^\n`~\\](?=(?:`{3,}|~{3,})[ \t]*[{.]*[A-Za-z]))"
    r"(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[^\n`]*)$"
)
_MOST_ENDS = 20  # fences inside one block that are tried as its end
_MARKDOWN = frozenset({"markdown", "md"})
_THINK = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_THINK_END = re.compile(r"\A.*</(?:think|thinking|reasoning)>", re.DOTALL | re.IGNORECASE)
_THINK_START = re.compile(r"<(?:think|thinking|reasoning)>.*\Z", re.DOTALL | re.IGNORECASE)
SPECIAL = re.compile(r"<\|[a-z_]+\|>|<\uff5c[^\uff5c>]*\uff5c>|</s>(?=\s*(?:\n|\Z))|<file_sep>", re.IGNORECASE)
# What stands below the end of the model's turn, where an engine wrote on, is not its answer.
_TURN_END = re.compile(r"<\|(?:im_end|endoftext|eot_id|end_of_text)\|>", re.IGNORECASE)


def fenced(reply: str) -> list[tuple[str, str, bool]]:
    """(language in lower case, body, whether it is closed) of the fenced blocks outside the model's thoughts."""
    return list(_blocks(without_thoughts(reply).split("\n")))


def _blocks(lines: list[str]) -> Iterator[tuple[str, str, bool]]:
    at = 0
    while at < len(lines):
        opened = _OPENS.match(lines[at])
        at += 1
        if opened is None:
            continue
        language, mark = opened["language"].strip().lower(), opened["mark"]
        indent = opened["before"] if not opened["before"].strip() else " " * _width_of_list_mark(opened["before"])
        closing = re.compile(rf"[ \t]*{re.escape(mark)}[`~]*[ \t]*")
        ends = [i for i in range(at, len(lines)) if closing.fullmatch(lines[i])]
        end = ends[0] if ends else len(lines)
        if len(ends) > 1 and language[:2] in ("", "py", "{p", "{."):
            # A fence in a docstring does not end the block: where it ends, it is Python.
            whole = (i for i in ends[:_MOST_ENDS] if _is_python(_outdented(_joined(lines[at:i]), indent)))
            end = next(whole, end)
        if language[:2] in ("", "py", "{p", "{.") and (cut := _closed_in_line(lines[at:end], mark)) is not None:
            yield language, _outdented(_joined(cut), indent), True
            at += len(cut)
            continue
        body = _outdented(_joined(lines[at:end]) if ends else "\n".join(lines[at:]), indent)
        yield language, body, bool(ends)
        if language in _MARKDOWN:
            yield from _blocks(body.split("\n"))
        at = end + 1


def _closed_in_line(lines: list[str], mark: str) -> list[str] | None:
    """The lines of a block whose closing fence stands behind its last line of code; None where there is none."""
    closing = re.compile(rf"(?P<code>[^`~#]*[^`~#\s]){re.escape(mark)}[ \t]*")
    for number, line in enumerate(lines):
        if found := closing.fullmatch(line):
            cut = [*lines[:number], found["code"]]
            return cut if _is_python(_joined(cut)) else None
    return None


def _joined(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _width_of_list_mark(before: str) -> int:
    return len(before) if re.fullmatch(r"[ \t]*(?:[-*+]|\d+[.)])[ \t]+", before) else 0


def _is_python(body: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(ast.parse(body).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def last_block(reply: str) -> str | None:
    """The body of the last fenced block that is not empty (thoughts left out); None without one."""
    bodies = [body for _, body, _ in fenced(reply) if body.strip()]
    return bodies[-1] if bodies else None


def without_thoughts(reply: str) -> str:
    """``reply`` without special tokens and the model's thoughts (closed ones, one whose opening tag was in the prompt,
    one that never closes), line ends made ``\\n``."""
    text = newlines(reply)
    text = next((part for part in _TURN_END.split(text) if part.strip()), text)
    text = _THINK_END.sub("", _THINK.sub("", text))
    return SPECIAL.sub("", _THINK_START.sub("", text))


def newlines(text: str) -> str:
    """``text`` without a byte order mark and with every line end as ``\\n``."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _outdented(body: str, indent: str) -> str:
    """A block inside a list stands as far in as its fence (CommonMark 0.31, section 4.5)."""
    return re.sub(rf"^[ \t]{{1,{len(indent)}}}", "", body, flags=re.MULTILINE) if indent else body
