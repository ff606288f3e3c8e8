"""The files of a repository, read once and without trust: no link is followed, nothing is executed, all is bounded.

What is left out is counted by reason. A file that changes meanwhile is what was read of it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qtool import QtoolError
from qtool.context.packages import required
from qtool.convert.text.source import CODE, FILE_LIMIT

MOST_FILES = 20_000
MOST_BYTES = 2 * 10**8  # of all files
MOST_DEEP = 64  # folders inside one another
LONGEST_LINE = 5_000  # characters: longer ones are data, or code that a program wrote
IGNORE_FILE, IGNORE_LIMIT, MOST_STARS = ".gitignore", 2**16, 8  # wildcards of a pattern: more are slow to match
GENERATED = frozenset({"node_modules", "__pycache__"})
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), 127, *range(128, 160)), "�")
_CONTROLS[12] = " "  # a form feed parts sections of old sources
Rules = tuple[tuple[str, object], ...]  # folder, its patterns; the innermost last


@dataclass(frozen=True)
class SourceFile:
    """``path``: from the repository's top, with slashes; ``text``: lines end in ``\\n``, without control characters."""

    path: str
    text: str


@dataclass(frozen=True)
class Tree:
    """``left_out``: reason -> files."""

    files: tuple[SourceFile, ...]
    left_out: dict[str, int]


class _Unread(Exception):
    """Why a file is left out."""


def read_tree(root: Path) -> Tree:
    """In the order of paths. Raises QtoolError where ``root`` is no folder or holds nothing that can be read."""
    if not root.is_dir():
        raise QtoolError(f"{root}: no folder; name a repository's.")
    top = root.resolve()  # a link that the user names is followed, none that is found
    files: list[SourceFile] = []
    left_out: Counter[str] = Counter()
    room, rules = MOST_BYTES, dict[str, Rules]()
    for place, folders, names, handle in os.fwalk(top, onerror=lambda _: left_out.update(["unreadable"])):
        here = Path(place).relative_to(top).as_posix()
        own = rules.get(here, ()) + _patterns(handle, here)
        folders[:] = _entered(here, sorted(folders), own, left_out, handle)
        rules.update({_joined(here, name): own for name in folders})
        for name in sorted(names):
            path = _joined(here, name)
            try:
                text = _read(handle, name, path, own, room, len(files))
            except _Unread as reason:
                left_out[str(reason)] += 1
                continue
            room -= len(text)
            if text.strip():
                files.append(SourceFile(path, text))
    if not files:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "it is empty"
        raise QtoolError(f"{root}: holds no file of code or prose that can be read ({why}).")
    return Tree(tuple(sorted(files, key=lambda file: file.path)), dict(sorted(left_out.items())))


def _joined(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _entered(here: str, names: list[str], rules: Rules, left_out: Counter[str], handle: int) -> list[str]:
    """Folders that are looked into."""
    entered = []
    for name in names:
        path = _joined(here, name)
        try:
            found = os.stat(name, dir_fd=handle, follow_symlinks=False)
        except OSError:  # gone meanwhile
            left_out["unreadable"] += 1
            continue
        if stat.S_ISLNK(found.st_mode):
            left_out["links"] += 1
        elif name.startswith("."):
            left_out["hidden folders"] += 1
        elif not name.isprintable():
            left_out["folders with a name that cannot be shown"] += 1
        elif name in GENERATED or _ignored(f"{path}/", rules):
            left_out["ignored folders"] += 1
        elif path.count("/") + 1 >= MOST_DEEP:
            left_out["too deep"] += 1
        else:
            entered.append(name)
    return entered


def _read(handle: int, name: str, path: str, rules: Rules, room: int, read: int) -> str:
    if name.startswith("."):
        raise _Unread("hidden")
    if not name.isprintable():
        raise _Unread("with a name that cannot be shown")
    if PurePosixPath(name).suffix.lower() not in CODE:
        raise _Unread("neither code nor prose")
    if _ignored(path, rules):
        raise _Unread("ignored")
    if read >= MOST_FILES or room <= 0:
        raise _Unread(f"beyond {MOST_FILES:,} files or {MOST_BYTES // 10**6} MB")
    data = _bytes(handle, name, FILE_LIMIT)
    if b"\0" in data:
        raise _Unread("binary")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _Unread("not UTF-8") from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if max(map(len, lines)) > LONGEST_LINE:
        raise _Unread("with lines that no one wrote")
    return "\n".join(lines).translate(_CONTROLS)


def _bytes(handle: int, name: str, limit: int) -> bytes:
    """Of a regular file. O_NONBLOCK: a pipe would wait for its other end."""
    try:
        opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=handle)
    except OSError as error:
        raise _Unread("links" if error.errno == errno.ELOOP else "unreadable") from None
    with os.fdopen(opened, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise _Unread("no regular files")
        if found.st_size > limit:
            raise _Unread("huge")
        try:
            data = file.read(limit + 1)
        except OSError:
            raise _Unread("unreadable") from None
    if len(data) > limit:
        raise _Unread("huge")
    return data


def _patterns(handle: int, here: str) -> Rules:
    """Of this folder's .gitignore."""
    try:
        text = _bytes(handle, IGNORE_FILE, IGNORE_LIMIT).decode("utf-8", "replace")
    except _Unread:
        return ()
    spec = required("pathspec").GitIgnoreSpec
    lines = [line for line in text.splitlines() if line.count("*") + line.count("?") <= MOST_STARS and len(line) < 500]
    try:
        return ((here, spec.from_lines(lines)),)
    except ValueError:  # a pattern that git would not take either
        return ()


def _ignored(path: str, rules: Rules) -> bool:
    """As git decides: the innermost folder whose patterns say anything."""
    for folder, spec in reversed(rules):
        inner = path if folder == "." else path[len(folder) + 1 :]
        said = spec.check_file(inner).include  # type: ignore[attr-defined]  # pathspec's types lack it
        if said is not None:
            return bool(said)
    return False
