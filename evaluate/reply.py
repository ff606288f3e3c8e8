"""The parts of a chat model's reply: its thoughts, its fenced blocks, the text. Pure functions."""

import re

_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[^\n`]*)\n"
    r"(?P<body>.*?)(?:^[ \t]*(?P<closed>(?P=mark)[`~]*)[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
_THINK = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_THINK_END = re.compile(r"\A.*</(?:think|thinking|reasoning)>", re.DOTALL | re.IGNORECASE)
_THINK_START = re.compile(r"<(?:think|thinking|reasoning)>.*\Z", re.DOTALL | re.IGNORECASE)
SPECIAL = re.compile(r"<\|[a-z_]+\|>|<\uff5c[^\uff5c>]*\uff5c>|</s>|<file_sep>", re.IGNORECASE)


def fenced(reply: str) -> list[tuple[str, str, bool]]:
    """(language in lower case, body, whether it is closed) of the fenced blocks outside the model's thoughts."""
    return [
        (match["language"].strip().lower(), _outdented(match["body"], match["indent"]), match["closed"] is not None)
        for match in _FENCE.finditer(without_thoughts(reply))
    ]


def last_block(reply: str) -> str | None:
    """The body of the last fenced block that is not empty (thoughts left out); None without one."""
    bodies = [body for _, body, _ in fenced(reply) if body.strip()]
    return bodies[-1] if bodies else None


def answered(reply: str, entry_point: str | None) -> bool:
    """Whether a closed block holds the answer: one that names ``entry_point`` as what it defines (None: any)."""
    name = re.escape(entry_point or "")
    header = re.compile(rf"\b(?:def|class|function|const|let|var)\s+{name}\b|\b{name}\s*=")
    return any(closed and (entry_point is None or header.search(body)) for _, body, closed in fenced(reply))


def without_thoughts(reply: str) -> str:
    """``reply`` without special tokens and the model's thoughts (closed ones, one whose opening tag was in the prompt,
    one that never closes), line ends made ``\\n``."""
    text = _THINK_END.sub("", _THINK.sub("", newlines(reply)))
    return SPECIAL.sub("", _THINK_START.sub("", text))


def newlines(text: str) -> str:
    """``text`` with every line end as ``\\n``."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _outdented(body: str, indent: str) -> str:
    """A block inside a list stands as far in as its fence (CommonMark 0.31, section 4.5)."""
    return re.sub(rf"^[ \t]{{1,{len(indent)}}}", "", body, flags=re.MULTILINE) if indent else body
