"""Plain Python values as bytes: what crosses between a hostile candidate and the checker that judges it.

A frame is a 4-byte big-endian length and that many bytes of JSON. Values that JSON lacks are one-key objects:

    {"t": [..]} tuple      {"s": [..]} set     {"z": [..]} frozenset    {"d": [[k, v], ..]} dict
    {"g": [..]} iterator   {"b": hex} bytes    {"y": hex} bytearray     {"c": [re, im]} complex
    {"r": [start, stop, step]} range   {"i": hex} int beyond 64 bits   {"f": "nan"} float JSON cannot spell
    {"o": [name, value]} a container of the collections module

Decoding builds builtin values (and four containers of the standard library) and nothing else, whatever the
bytes say: an object with its own ``__eq__`` cannot reach the checker. Never pickle.
"""

import collections
import json
import os
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

MAX_FRAME = 16 * 2**20
# A job comes from this side: contest problems bring megabytes of tests.
MAX_JOB = 256 * 2**20
# An outcome with a detail of 600 characters, each of up to 12 bytes here.
MAX_ANSWER = 8192
MAX_ITEMS = 100_000

_PLAIN_BASES: tuple[Any, ...] = (bool, int, float, str, bytes, list, tuple, dict, set, frozenset)
_CONTAINERS: dict[str, type] = {
    "Counter": collections.Counter,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": collections.defaultdict,
    "deque": collections.deque,
}


class NotPlain(Exception):
    """A value that cannot cross, or bytes that do not spell a value."""


def pack(value: Any, limit: int = MAX_FRAME) -> bytes:
    """``value`` as the bytes of a frame's content. Raises NotPlain, also above ``limit`` bytes."""
    try:
        data = json.dumps(_encode(value), separators=(",", ":"), allow_nan=False).encode("ascii")
    except RecursionError as error:
        raise NotPlain("a value nested too deeply") from error
    if len(data) > limit:
        raise NotPlain(f"a value of {len(data)} bytes (limit {limit})")
    return data


def unpack(data: bytes) -> Any:
    """The value that ``pack`` was given. Raises NotPlain for every other byte string."""
    try:
        return _decode(json.loads(data))
    except NotPlain:
        raise
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise NotPlain(f"not a value ({type(error).__name__})") from error


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


def _encode(value: Any) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**63 else {"i": hex(value)}
    if kind is float:
        finite = value == value and abs(value) != float("inf")
        return value if finite else {"f": repr(value)}
    if kind is list:
        return [_encode(item) for item in value]
    if kind is dict:
        return {"d": [[_encode(key), _encode(item)] for key, item in value.items()]}
    for sequence, tag in ((tuple, "t"), (set, "s"), (frozenset, "z")):
        if kind is sequence:
            return {tag: [_encode(item) for item in value]}
    if kind in (bytes, bytearray):
        return {"b" if kind is bytes else "y": value.hex()}
    if kind is complex:
        return {"c": [_encode(value.real), _encode(value.imag)]}
    if kind is range:
        return {"r": [_encode(value.start), _encode(value.stop), _encode(value.step)]}
    return _encode_other(value, kind)


def _encode_other(value: Any, kind: type) -> Any:
    for name, container in _CONTAINERS.items():
        if kind is container:
            return {"o": [name, _encode(list(value) if kind is collections.deque else dict(value))]}
    # A subclass that compares as its base does (a namedtuple, an IntEnum) travels as the base.
    for base in _PLAIN_BASES:
        if isinstance(value, base) and kind.__eq__ is base.__eq__:
            content = base.__int__(value) if base is int else base(value)
            if type(content) is base:
                return _encode(content)
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        return _encode(value.item())
    if isinstance(value, (Iterator, KeysView, ValuesView, ItemsView)):
        items = []
        for item in value:
            items.append(_encode(item))
            if len(items) > MAX_ITEMS:
                raise NotPlain(f"an iterator of more than {MAX_ITEMS} items")
        return {"g": items}
    raise NotPlain(f"a {kind.__name__}, not a plain builtin value")


def _decode(node: Any) -> Any:
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, list):
        return [_decode(item) for item in node]
    if not isinstance(node, dict) or len(node) != 1:
        raise NotPlain("not a value (untagged object)")
    ((tag, content),) = node.items()
    if tag in ("i", "f", "b", "y"):
        return _decode_text(tag, content)
    if tag == "o":
        return _decode_container(*content)
    if not isinstance(content, list):
        raise NotPlain("not a value (tag without a list)")
    if tag == "d":
        return {_decode(key): _decode(item) for key, item in content}
    items = [_decode(item) for item in content]
    if tag == "t":
        return tuple(items)
    if tag == "s":
        return set(items)
    if tag == "z":
        return frozenset(items)
    if tag == "g":
        return iter(items)
    if tag == "c" and len(items) == 2 and all(type(item) is float for item in items):
        return complex(items[0], items[1])
    if tag == "r" and len(items) == 3 and all(type(item) is int for item in items):
        return range(*items)
    raise NotPlain("not a value (unknown tag)")


def _decode_text(tag: str, content: Any) -> Any:
    if not isinstance(content, str):
        raise NotPlain("not a value (tag without text)")
    if tag == "i":
        return int(content, 16)
    if tag == "f":
        return {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}[content]
    return bytes.fromhex(content) if tag == "b" else bytearray.fromhex(content)


def _decode_container(name: str, content: Any) -> Any:
    value = _decode(content)
    if name == "deque" and type(value) is list:
        return collections.deque(value)
    if type(value) is not dict:
        raise NotPlain("not a value (container without items)")
    if name == "defaultdict":
        return collections.defaultdict(None, value)
    return {"Counter": collections.Counter, "OrderedDict": collections.OrderedDict}[name](value)
