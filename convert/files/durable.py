"""Files that outlive a kill: whole or absent, read again or set aside, held by one process, swept after a dead one."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from qtool import QtoolError
from qtool.convert.files.reading import CONFIG_LIMIT, read_bytes, shown

Record = TypeVar("Record", bound=BaseModel)
DAMAGED = ".damaged"
STORED_LIMIT = 16 * CONFIG_LIMIT  # a stored score holds every answer
_TEMPORARY = re.compile(r"\.(\d+)\.[0-9a-f]{8}\.partial")
_INPUT_FAULTS = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}  # a name that is wrong


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block becomes a QtoolError (exit 3) that names ``path``: a failed flush does not say which
    file it was."""
    try:
        yield
    except OSError as error:
        raise QtoolError(f"{path}: {error.strerror or error}. Free what is missing and run again.", 3) from error


def write_whole(path: Path, data: bytes | str) -> None:
    """Write beside under a name of this process's own, make it durable, then rename: at every moment ``path`` is what
    it was or what it shall be. Raises QtoolError (exit 3)."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = temporary(path)
        try:
            with beside.open("wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
                beside.replace(path)
            make_durable(path.parent)
        except BaseException:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill beside ``folder``; filled, it is made durable and gets that name. Where another process was
    first, its folder stays. Raises QtoolError (exit 3)."""
    beside = temporary(folder)
    with naming(beside):
        beside.mkdir(parents=True)
        descriptor = os.open(beside, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield beside
        with naming(folder):
            for path in (*beside.iterdir(), beside):
                make_durable(path)
            try:
                beside.rename(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            make_durable(folder.parent)
    finally:
        os.close(descriptor)
        shutil.rmtree(beside, ignore_errors=True)


def temporary(path: Path) -> Path:
    """A name beside ``path`` that tells whose it is, so that `sweep` knows when its owner is gone."""
    return path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")


def make_durable(path: Path) -> None:
    """A file's contents, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(path: Path, record: BaseModel) -> None:
    """A record as JSON, whole or absent. Raises QtoolError (exit 3)."""
    write_whole(path, record.model_dump_json(indent=1) + "\n")


def load(kind: type[Record], path: Path, fault: Callable[[Record], str] = lambda record: "") -> Record | None:
    """What `save` wrote; None where there is nothing, or where it is damaged: it is then named and set aside, so that
    it is made again. ``fault`` says what is wrong with a record that can be read ("" for nothing)."""
    if not os.path.lexists(path):
        return None
    try:
        record = kind.model_validate_json(read_bytes(path, STORED_LIMIT))
        why = fault(record)
    except ValidationError as error:
        found = error.errors()[0]
        record, why = None, f"{'.'.join(map(str, found['loc'])) or 'JSON'}: {found['msg']}"
    except QtoolError as error:
        record, why = None, error.message.removeprefix(f"{path}: ").rstrip(".")
    if record is None or why:
        set_aside(path, why)
        return None
    return record


def set_aside(path: Path, why: str) -> None:
    """Rename a damaged file or folder and say so in one line. Raises QtoolError (exit 3) where it cannot be moved."""
    numbers = (f"{DAMAGED}{n or ''}" for n in range(1000))
    with naming(path):
        target = next(p for end in numbers if not os.path.lexists(p := path.with_name(path.name + end)))
        path.rename(target)
    say(f"{path}: damaged ({' '.join(why.split())[:200]}); kept as {target.name} and made again.")


def say(line: str) -> None:
    """One line to whoever watches; the progress bar lets it through."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def held(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock file ``path``; ``waiting`` is said once where another process has it. It goes with its holder,
    however that ends. Raises QtoolError (exit 3) where it cannot be made."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path, waiting)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _lock(path: Path, waiting: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(waiting)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if is_still(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it at its end: the lock of a name that is gone guards nothing


def is_still(path: Path, descriptor: int) -> bool:
    """Whether ``path`` still names what was opened."""
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in ``folder`` (`temporary`), never what a living one writes."""
    for path in folder.glob("*.partial") if folder.is_dir() else []:
        match = _TEMPORARY.search(path.name)
        if match is not None and _abandoned(path, int(match[1])):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def work_folder(prefix: str, remove: Callable[[str], None] = shutil.rmtree) -> tuple[str, int]:
    """A fresh folder under the temporary folder, and the descriptor that holds it: as long as that is open, no other
    process takes the folder for a dead one's. Those of dead ones are removed first (with ``remove``)."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        named = re.fullmatch(re.escape(prefix) + r"(\d+)-.*", path.name)
        if named and _ours(path) and _abandoned(path, int(named[1])):
            with suppress(OSError):
                remove(str(path))
    folder = tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-")
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return folder, descriptor


@contextmanager
def working_folder(prefix: str) -> Iterator[str]:
    """`work_folder`, removed when the block ends."""
    folder, descriptor = work_folder(prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _ours(path: Path) -> bool:
    with suppress(OSError):
        found = path.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return False


def _abandoned(path: Path, owner: int) -> bool:
    """Whether nobody holds ``path`` and its owner is gone. (The lock decides, for another container's numbers mean
    nothing here; the number covers the moment between making and locking.)"""
    if owner != os.getpid():  # in a container every run may have the same number
        try:
            os.kill(owner, 0)
            return False
        except ProcessLookupError:
            pass
        except OSError:
            return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def require_writable(folder: Path, key: str) -> None:
    """Write into ``folder``, or where it will be made, before any work. ``key``: what names it. Raises QtoolError:
    exit 2 where the name is a file's or no name, exit 3 where the disk is full or may not be written."""
    try:
        place = folder
        while not _is_there(place):
            place = place.parent
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is not a folder")
        sweep(place)  # a probe that was killed
        probe = temporary(place / "probe")
        try:
            with probe.open("wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        if isinstance(error, ValueError) or error.errno in _INPUT_FAULTS:
            where = f"{shown(place)} " if place != folder and isinstance(error, NotADirectoryError) else ""
            raise QtoolError(f"{key} {shown(folder)}: {where}{why}. Name a folder.") from error
        raise QtoolError(
            f"{key} {folder}: cannot be written ({why}). Free some space, mend its rights, or name another folder.",
            exit_code=3,
        ) from error
