"""Reading files that strangers made: regular files only, of a bounded size, in an encoding that is said.

Every file that a user or a model folder names is opened here. A pipe would wait for ever and /dev/zero would never end,
so what a path is, and how large, is asked before the first byte is read.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from qtool import QtoolError

MB = 10**6
CONFIG_LIMIT = 64 * MB  # config.json, generation_config.json, an index: the largest real one has 11 MB
TOKENIZER_LIMIT = 512 * MB  # tokenizer.json: the largest real one has 33 MB
TEXT_LIMIT = 1024 * MB  # calibration and evaluation text, task files
_SHARED_BLOB = re.compile(r"blobs/[0-9a-f]{2}/[0-9a-f]{64}")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_file(path: Path, limit: int | None = None) -> BinaryIO:
    """Open a regular file for reading.

    Raises QtoolError naming it where it is missing, unreadable, no regular file, or has over ``limit`` bytes.
    """
    try:
        # a pipe without a writer would wait in open() itself
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise QtoolError(f"{path}: no such file.") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise QtoolError(f"{shown(path)}: {getattr(error, 'strerror', None) or error}.") from error
    found = os.fstat(descriptor)
    if kind := other_kind(found.st_mode):
        os.close(descriptor)
        raise QtoolError(f"{path}: is {kind}, not a file.")
    if limit is not None and found.st_size > limit:
        os.close(descriptor)
        raise QtoolError(f"{path}: has {_mb(found.st_size)} MB; qtool reads at most {_mb(limit)} MB here.")
    return os.fdopen(descriptor, "rb")


def other_kind(mode: int) -> str:
    """What a path with this ``st_mode`` is, where it is no regular file: `a folder`, `a pipe`; "" for a file."""
    if stat.S_ISREG(mode):
        return ""
    return next((word for test, word in _KINDS if test(mode)), "something else")


def _mb(size: int) -> str:
    return f"{size / MB:,.0f}" if size >= MB else f"{size / MB:.2g}"


def named(text: str) -> Path:
    """The path that a user wrote, ~ read as a home. Raises QtoolError for what no file system could hold."""
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except RuntimeError as error:
        raise QtoolError(f"{shown(text)}: there is no such user's home folder.") from error
    except ValueError as error:
        raise QtoolError(f"{shown(text)}: a path cannot hold this character ({error}).") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP):
            raise QtoolError(f"{shown(text)}: {error.strerror}.") from error
        return path  # missing: whoever needs it says so
    return path


def read_bytes(path: Path, limit: int = TEXT_LIMIT) -> bytes:
    """A whole file. Raises QtoolError as `open_file` does."""
    with open_file(path, limit) as file:
        try:
            return file.read()
        except OSError as error:
            raise QtoolError(f"{path}: {error.strerror}.") from error


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """A whole file of UTF-8, a byte order mark left out. Raises QtoolError as `open_file` does, and for another
    encoding, with the byte where it shows."""
    return decoded(read_bytes(path, limit), str(path))


def decoded(data: bytes, where: str) -> str:
    """UTF-8 bytes as text, a byte order mark left out. Raises QtoolError naming ``where``, the byte and the way out."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise QtoolError(f"{where}: is UTF-16, not UTF-8. Convert it: `iconv -f UTF-16 -t UTF-8`.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QtoolError(
            f"{where}: is not UTF-8 (byte {error.start}: 0x{data[error.start]:02x}). "
            "If it is Latin-1, convert it: `iconv -f ISO-8859-1 -t UTF-8`."
        ) from error


def read_json(path: Path, limit: int = CONFIG_LIMIT, strict: bool = False) -> dict[str, Any]:
    """A JSON object from a file; QtoolError naming the file when it is missing or is not one. ``strict``: as
    `strict_json` reads it."""
    if not os.path.lexists(path):
        raise QtoolError(f"{path}: no such file. Is this a model folder?")
    try:
        text = read_text(path, limit)
        data = strict_json(text) if strict else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QtoolError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(data, dict):
        raise QtoolError(f"{path}: expected a JSON object.")
    return data


def strict_json(text: str) -> Any:
    """JSON in which every reader sees the same: no key twice, no NaN, no Infinity, no number beyond a float's range.
    Raises ValueError saying which."""
    return json.loads(text, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)!r} is there twice")
        found[key] = value
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is no finite number")
    return value


def leaves_folder(folder: Path, path: Path) -> bool:
    """Whether ``path``, a name inside ``folder``, is a link to somewhere else, or lies behind one.

    The Hub's cache keeps a snapshot as links to its own blobs (models--A--B/snapshots/COMMIT/NAME -> blobs/SHA256), of
    a folder in a snapshot too, and these as links to a store that all its models share (blobs/XX/HASH beside
    models--A--B): both stay.
    """
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return False
    cache = hub_cache(home)
    if cache is None:
        return True
    shared = real.is_relative_to(cache.parent) and _SHARED_BLOB.fullmatch(real.relative_to(cache.parent).as_posix())
    return not (shared or real.is_relative_to(cache / "blobs"))


def refuse_link(folder: Path, path: Path) -> None:
    """Raises QtoolError for a file of a model's folder that lies elsewhere: what it holds was not meant to be read."""
    if leaves_folder(folder, path):
        raise QtoolError(f"{shown(path)}: is a link that leaves its folder. Put the file itself there.")


def hub_cache(home: Path) -> Path | None:
    """The folder models--A--B of the Hub's cache that ``home``, a snapshot or a folder inside one, belongs to."""
    for folder in home.parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return folder.parent
    return None


def shown(path: Path | str) -> str:
    """A name for a message: printable, and short where somebody's name is not."""
    text = str(path).encode("utf-8", "replace").decode("utf-8")
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 200 else f"{text[:120]}…{text[-40:]}"
