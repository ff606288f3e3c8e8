"""Files cut into pieces: definitions with the comments above them, what lies between; what each defines and uses."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qtool import QtoolError
from qtool.context.files import SourceFile
from qtool.context.grammars import DOCSTRING, Definition, Tags, require_grammars, tags_of
from qtool.convert.text.bounded import Overrun, bounded

WHOLE = 60  # lines: a definition that is longer is cut into those inside it
CHUNK = 40  # lines of what lies between
SECONDS, PER_MB = 20.0, 20.0  # of the processor: a parser takes a second for a megabyte
MEMORY = 4 * 2**30
ELIDED = "    ..."
Row = TypeVar("Row")
_ABOVE = ("#", "//", "/*", "*", "*/", "@", "--", ";;")  # how lines begin that belong to the definition below


@dataclass(frozen=True)
class Piece:
    """Lines ``start`` to ``end`` (from 1, both included) of a file. ``names``: what it defines; ``outline``: signatures
    and the beginnings of docstrings, "" where it defines nothing; ``uses``: name -> how often."""

    path: str
    start: int
    end: int
    text: str
    names: tuple[str, ...] = ()
    outline: str = ""
    uses: dict[str, int] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """`src/a.py:10-24`."""
        return f"{self.path}:{self.start}-{self.end}"


def cut(files: tuple[SourceFile, ...]) -> list[Piece]:
    """All pieces, in the order of files and lines. Files are parsed in a child process with limits of time and memory.
    Raises QtoolError where they break these."""
    size = sum(len(file.text) for file in files) / 10**6
    require_grammars(files)

    def work() -> Iterator[Any]:
        for file in files:
            for piece in pieces_of(file, tags_of(file)):
                yield [piece.start, piece.end, piece.names, piece.outline, piece.uses, piece.path]

    try:
        rows = bounded(work, SECONDS + PER_MB * size, MEMORY, answer=2**30)
    except Overrun as error:
        last = error.done[-1][-1] if error.done else files[0].path
        raise QtoolError(f"{last}, or the file behind it: its parser {error.reason}.") from error
    lines = {file.path: file.text.split("\n") for file in files}
    return [
        Piece(path, start, end, "\n".join(lines[path][start - 1 : end]), tuple(names), outline, dict(uses))
        for start, end, names, outline, uses, path in rows
    ]


def pieces_of(file: SourceFile, tags: Tags) -> Iterator[Piece]:
    """One file's."""
    lines = file.text.split("\n")
    units = [_with_above(lines, unit) for unit in _units(tags.definitions)]
    at, spans = 0, []
    for start, end in units:
        start = max(start, at)
        spans += [*_chunks(lines, at, start), (start, end)]
        at = max(at, end)
    spans += _chunks(lines, at, len(lines))
    for start, end in spans:
        inside = _between(tags.definitions, start, end, lambda one: one.start)
        uses = Counter(name for _, name in _between(tags.references, start, end, lambda one: one[0]))
        yield Piece(
            path=file.path, start=start + 1, end=end, text="\n".join(lines[start:end]),
            names=tuple(dict.fromkeys(one.name for one in inside)), outline=_outline(lines, inside, start, end),
            uses=dict(sorted(uses.items())),
        )  # fmt: skip


def _between(ordered: Sequence[Row], start: int, end: int, row: Callable[[Row], int]) -> Sequence[Row]:
    """Those in rows [start, end), of a sequence in the order of rows."""
    return ordered[bisect_left(ordered, start, key=row) : bisect_left(ordered, end, key=row)]


def _units(definitions: tuple[Definition, ...]) -> list[tuple[int, int]]:
    """Rows [start, end) of definitions that are not inside another unit."""
    found: list[tuple[int, int]] = []
    ordered = sorted(definitions, key=lambda one: (one.start, -one.end))
    for number, one in enumerate(ordered):
        if found and one.start < found[-1][1]:
            continue
        holds = any(other.start > one.start and other.end <= one.end for other in ordered[number + 1 : number + 2])
        if one.end - one.start <= WHOLE or not holds:
            found.append((one.start, one.end))
    return found


def _with_above(lines: list[str], unit: tuple[int, int]) -> tuple[int, int]:
    start, end = unit
    while start > 0 and lines[start - 1].lstrip().startswith(_ABOVE):
        start -= 1
    return start, end


def _chunks(lines: list[str], start: int, end: int) -> Iterator[tuple[int, int]]:
    """What lies between, blank edges left out, at most CHUNK lines each; rather cut at a blank line."""
    while start < end:
        if not lines[start].strip():
            start += 1
            continue
        stop = min(end, start + CHUNK)
        if stop < end:
            blank = next((row for row in range(stop, start + CHUNK // 2, -1) if not lines[row].strip()), stop)
            stop = blank
        last = stop
        while not lines[last - 1].strip():
            last -= 1
        yield start, last
        start = stop


def _outline(lines: list[str], inside: Sequence[Definition], start: int, end: int) -> str:
    """Rows of signatures and docstrings and the last above the first of them, an ellipsis where rows between are left
    out."""
    shown = sorted({row for one in inside for row in one.outline if row < end})
    if shown:
        shown = [*range(max(start, shown[0] - DOCSTRING), shown[0]), *shown]
    told: list[str] = []
    for number, row in enumerate(shown):
        if number and row != shown[number - 1] + 1:
            told.append(ELIDED)
        told.append(lines[row])
    return "\n".join(told)
