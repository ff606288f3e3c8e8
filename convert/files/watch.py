"""Whether files that decide the bytes of an artifact are still what they were when its key was made of them."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from qtool import QtoolError
from qtool.convert.files.reading import open_file

Stamp = tuple[int, int, int, int]  # bytes, modified, changed (nanoseconds), inode
SETTLED = 50_000_000  # nanoseconds since a file's last change, after which another one gets another stamp
SIDE_BY_SIDE = 8  # files read at a time
_known: dict[tuple[int, Stamp], str] = {}  # (device, stamp) -> sha256 of what this process has read itself
_BLOB = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")  # the Hub's cache names its files by their sha256, small ones as git


@dataclass
class Watched:
    """A file as it was seen first. ``digest`` is compared only where the stamp has changed: a copy in its place, or one
    that was touched, may hold the same bytes. None: nobody knows what the file has to hold."""

    path: Path
    stamp: Stamp
    digest_of: Callable[[Path], str] = field(default=lambda path: sha256_file(path))
    known: bool = True
    _digest: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def digest(self) -> str | None:
        """Read when it is first asked for. Raises QtoolError where the file has changed before that: what was read of
        it until then, and this, would be of two files."""
        with self._lock:
            if self.known and self._digest is None:
                try:
                    found = self.digest_of(self.path)
                    same = stamp_of(self.path) == self.stamp
                except OSError as error:
                    raise QtoolError(f"{self.path}: cannot be read any more ({error.strerror}). {_RESTORE}") from error
                if not same:
                    raise QtoolError(f"{self.path}: changed while the model was being read. Run again.")
                self._digest = found
            return self._digest

    def require_unchanged(self) -> None:
        """Raises QtoolError naming the file where it has changed or is gone."""
        try:
            now = stamp_of(self.path)
            if now == self.stamp:
                return
            same = self._digest is not None and self.digest_of(self.path) == self._digest
        except (OSError, QtoolError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise QtoolError(f"{self.path}: cannot be read any more ({why}). {_RESTORE}") from error
        if not same:
            raise QtoolError(f"{self.path}: changed while the model was being converted. {_RESTORE}")
        self.stamp = now


_RESTORE = (
    "Nothing was finished from it. Put back what was there and run again: it continues after the last layer made "
    "before the change; or run with the new files, which is another artifact."
)


def watch(path: Path) -> Watched:
    """A file with its sha256. Raises QtoolError where it cannot be read, OSError where it is gone."""
    stamp = stamp_of(path)  # before it is read: what changes in between is seen
    return Watched(path, stamp, _digest=sha256_file(path))


def watch_later(path: Path) -> Watched:
    """A file whose sha256 is read when it is asked for. Raises QtoolError where it is gone."""
    try:
        return Watched(path, stamp_of(path))
    except OSError as error:
        raise QtoolError(f"{path}: {error.strerror}.") from error


def watch_blob(path: Path) -> Watched:
    """A file of the Hub's cache, which nobody digests: its name says what it holds."""
    name = Path(os.path.realpath(path)).name
    return known_file(path, stamp_of(path), name if _BLOB.fullmatch(name) else None, blob=True)


def known_file(path: Path, stamp: Stamp, digest: str | None, blob: bool) -> Watched:
    """One that was looked at before, by this process or another. ``blob``: of the Hub's cache."""
    return Watched(path, stamp, _blob_name if blob else sha256_file, digest is not None, digest)


def require_unchanged(files: Sequence[Watched]) -> None:
    """Raises QtoolError naming the first file that is not what it was."""
    for file in files:
        file.require_unchanged()


def stamp_of(path: Path) -> Stamp:
    """Changes with every write: ``ctime`` even where the time of modification is set back."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def sha256_file(path: Path) -> str:
    """Hex sha256 of one file's bytes. A file that this process has read before is not read again while its stamp is
    the same. Raises QtoolError for what is no regular file."""
    return _digest_file(path, hashlib.sha256(), _known)


def take_digest(path: Path, stamp: Stamp, digest: str) -> None:
    """``digest`` is the file's as long as its stamp is ``stamp``: what `sha256_file` says of it then."""
    found = path.stat()
    if stamp_of(path) == stamp and time.time_ns() - stamp[2] > SETTLED:
        _known[found.st_dev, stamp] = digest


def sha256_files(paths: Iterable[Path]) -> list[str]:
    """`sha256_file` of each, several side by side: hashing does not hold Python's lock."""
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return list(pool.map(sha256_file, paths))


def digests(files: Sequence[Watched]) -> list[str | None]:
    """Of each, several read side by side."""
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return list(pool.map(lambda file: file.digest, files))


def _blob_name(path: Path) -> str:
    if len(os.path.basename(os.path.realpath(path))) == 64:
        return sha256_file(path)
    return _digest_file(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))


def _digest_file(path: Path, digest: hashlib._Hash, known: dict[tuple[int, Stamp], str] | None = None) -> str:
    try:
        with open_file(path) as file:
            seen = _stamped(file.fileno())
            settled = time.time_ns() - seen[1][2] > SETTLED
            if known is not None and (found := known.get(seen)) is not None:
                return found
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            same = _stamped(file.fileno()) == seen
    except OSError as error:
        raise QtoolError(f"{path}: {error.strerror}.") from error
    if known is not None and settled and same:
        known[seen] = digest.hexdigest()
    return digest.hexdigest()


def _stamped(descriptor: int) -> tuple[int, Stamp]:
    found = os.fstat(descriptor)
    return found.st_dev, (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
