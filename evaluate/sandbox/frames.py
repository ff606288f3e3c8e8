"""Messages between the processes of a judged program: a 4-byte big-endian length and that many bytes."""

import json
import os
from typing import Any

MAX_FRAME = 64 * 2**20
# A job comes from this side: contest problems bring megabytes of tests.
MAX_JOB = 256 * 2**20
# An outcome with a detail of 600 characters, each of up to 12 bytes here.
MAX_ANSWER = 8192


class NotPlain(Exception):
    """A value that cannot cross, or bytes that do not spell a value."""


def pack_json(value: Any, limit: int = MAX_FRAME) -> bytes:
    """Jobs and outcomes, which are JSON already, as a frame's content. Raises NotPlain above ``limit`` bytes."""
    data = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(data) > limit:
        raise NotPlain(f"a job of {len(data)} bytes (limit {limit})")
    return data


def unpack_json(data: bytes) -> Any:
    """What ``pack_json`` was given. Raises NotPlain for every other byte string."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError, MemoryError) as error:
        raise NotPlain(f"not JSON ({type(error).__name__})") from None


def write_frame(fd: int, data: bytes) -> None:
    """Write one whole frame; OSError if the reader is gone."""
    view = memoryview(len(data).to_bytes(4, "big") + data)
    while view:
        view = view[os.write(fd, view) :]


def read_frame(fd: int, limit: int = MAX_FRAME) -> bytes | None:
    """The next frame's content, None at the end of the stream. Raises NotPlain above ``limit`` bytes."""
    header = _read_exactly(fd, 4)
    if header is None:
        return None
    size = int.from_bytes(header, "big")
    if size > limit:
        raise NotPlain(f"a frame of {size} bytes (limit {limit})")
    return _read_exactly(fd, size)


def _read_exactly(fd: int, size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
