"""Where everything lies in a .gguf file: its header, read once, every count and place held against the file's length.

The `gguf` package's reader makes Python objects of as many items as a header claims (60 microseconds and a kilobyte
each): 45 bytes kept it busy for ever. Layout: ggml/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qtool.convert.files.reading import MB, open_file
from qtool.convert.formats.gguf.ggml import load_gguf

METADATA_LIMIT = 256 * MB  # before the first tensor; Gemma 3's 262,144 tokens need 6 MB
ITEMS_LIMIT = 3_000_000  # of all arrays together; the largest vocabularies with their merges have 900,000
MAX_KEYS, MAX_TENSORS = 1 << 14, 1 << 17
MAX_KEY, MAX_NAME = 65535, 1024  # bytes
MAX_DIMENSIONS = 4  # ggml.h, GGML_MAX_DIMS
MAX_ALIGNMENT = 1 << 16
_STRING, _ARRAY, _BOOL = 8, 9, 7
_LENGTH = struct.Struct("<Q")
# value type -> struct's letter; gguf.md, gguf_metadata_value_type
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class TensorPlace:
    """A tensor's ggml type, its shape in torch's order, and its bytes in the file."""

    type: str
    shape: tuple[int, ...]
    data_offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file holds: tensors by name; keys by name, each as (value type, the value's place in the file)."""

    tensors: dict[str, TensorPlace] = field(default_factory=dict)
    keys: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_header(path: Path, metadata: int = METADATA_LIMIT, items: int = ITEMS_LIMIT) -> Header:
    """Raises ValueError saying what is wrong with the header (at most ``metadata`` bytes, ``items`` array items), and
    QtoolError where ``path`` is no regular file."""
    with open_file(path) as file:
        size = file.seek(0, 2)
        if size < 24:
            raise ValueError(f"{size} bytes hold no header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, size, metadata, items).read()


def read_value(path: Path, header: Header, key: str) -> Any:
    """A key's value as Python has it, None where the file does not have it."""
    if key not in header.keys:
        return None
    kind, at = header.keys[key]
    with open_file(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if kind != _ARRAY:
            return _decode(data, kind, at, 1)[0]
        kind, count = struct.unpack_from("<IQ", data, at)
        return _decode(data, kind, at + 12, count)


def read_tensor(path: Path, place: TensorPlace) -> torch.Tensor:
    """A tensor's bytes, uint8 ``[nbytes]``. Raises ValueError where the file became shorter."""
    data = bytearray(place.nbytes)
    with open_file(path) as file:
        file.seek(place.data_offset)
        stream: Any = file  # typeshed's BinaryIO lacks what every buffered reader has
        if stream.readinto(data) != place.nbytes:
            raise ValueError(f"{path}: became shorter while it was read")
    return torch.frombuffer(data, dtype=torch.uint8)


def _decode(data: mmap.mmap, kind: int, at: int, count: int) -> list[Any]:
    if kind != _STRING:
        values = list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", data, at))
        return [bool(value) for value in values] if kind == _BOOL else values
    found = []
    for _ in range(count):
        (length,) = _LENGTH.unpack_from(data, at)
        found.append(data[at + 8 : at + 8 + length].decode(errors="replace"))
        at += 8 + length
    return found


class _Reader:
    def __init__(self, data: mmap.mmap, size: int, metadata: int, items: int) -> None:
        self.data, self.size, self.at = data, size, 0
        self.limit, self.items = min(size, metadata), items
        self.alignment = 32
        self.header = Header()

    def read(self) -> Header:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version = self._number("I")
        if version not in (2, 3):
            swapped = int.from_bytes(struct.pack("<I", int(version)), "big")
            raise ValueError(f"version {version}" if swapped > 3 else "it is of the other byte order")
        tensors, keys = int(self._number("Q")), int(self._number("Q"))
        # a key needs 13 bytes at least, a tensor 32
        if keys > min(MAX_KEYS, self.size // 13) or tensors > min(MAX_TENSORS, self.size // 32):
            raise ValueError(f"{keys} keys and {tensors} tensors in {self.size} bytes")
        self._keys(keys)
        self._tensors(tensors)
        return self.header

    def _keys(self, count: int) -> None:
        for _ in range(count):
            key = self._name(MAX_KEY, "key")
            if key in self.header.keys:
                raise ValueError(f"two keys {key!r}")
            kind = int(self._number("I"))
            self.header.keys[key] = (kind, self.at)
            if kind == _ARRAY:
                self._array(key)
                continue
            value = self._value(kind, key)
            if key == "general.alignment":
                if kind != 4 or not 1 <= value <= MAX_ALIGNMENT or int(value) & (int(value) - 1):
                    raise ValueError(f"general.alignment {value}")
                self.alignment = int(value)

    def _value(self, kind: int, key: str) -> float:
        if kind == _STRING:
            self._skip(int(self._number("Q")))
            return 0
        if kind not in _SCALARS:
            raise ValueError(f"{key}: unknown value type {kind}")
        value = self._number(_SCALARS[kind])
        if not math.isfinite(value) or (kind == _BOOL and value > 1):
            raise ValueError(f"{key} is {value}")
        return value

    def _array(self, key: str) -> None:
        kind, count = int(self._number("I")), int(self._number("Q"))
        self.items -= count
        if self.items < 0:
            raise ValueError(f"{key}: {count} items; qtool reads no such metadata")
        if kind == _STRING:
            self._strings(key, count)
        elif kind in _SCALARS:
            letter = _SCALARS[kind]
            start = self.at
            self._skip(count * struct.calcsize(f"<{letter}"))
            if letter in "fd" and any(math.isnan(x) for x in struct.unpack_from(f"<{count}{letter}", self.data, start)):
                raise ValueError(f"{key} holds NaN")
        else:
            raise ValueError(f"{key}: unknown type {kind} of an array's items")

    def _strings(self, key: str, count: int) -> None:
        at, last = self.at, self.limit - 8
        for _ in range(count):
            if at > last:
                at = self.limit + 1
                break
            at += 8 + _LENGTH.unpack_from(self.data, at)[0]
        if at > self.limit:
            raise ValueError(f"{key}: its strings go on past byte {self.limit}")
        self._skip(at - self.at)

    def _tensors(self, count: int) -> None:
        gguf = load_gguf()
        spans: list[tuple[int, int, str, str, tuple[int, ...]]] = []
        seen: set[str] = set()
        for _ in range(count):
            name = self._name(MAX_NAME, "tensor name")
            if name in seen:
                raise ValueError(f"two tensors {name!r}")
            seen.add(name)
            dimensions = int(self._number("I"))
            if not 1 <= dimensions <= MAX_DIMENSIONS:
                raise ValueError(f"{name}: {dimensions} dimensions")
            shape = [int(self._number("Q")) for _ in range(dimensions)]
            kind, offset = int(self._number("I")), int(self._number("Q"))
            try:
                known = gguf.GGMLQuantizationType(kind)
                block, width = gguf.GGML_QUANT_SIZES[known]
            except (ValueError, KeyError) as error:
                raise ValueError(f"{name}: unknown type {kind}") from error
            if min(shape) < 1 or shape[0] % block or offset % self.alignment:
                raise ValueError(f"{name}: shape {shape}, blocks of {block}, offset {offset}")
            spans.append((offset, math.prod(shape) // block * width, name, known.name, tuple(reversed(shape))))
        start = self.at + -self.at % self.alignment
        end, before = 0, ""
        for offset, length, name, *_ in sorted(spans):
            if offset < end:
                raise ValueError(f"{name} and {before} share bytes")
            end, before = offset + length, name
            if start + end > self.size:
                raise ValueError(f"truncated: {name} ends at byte {start + end}, the file at {self.size}")
        for offset, length, name, type_name, order in spans:
            self.header.tensors[name] = TensorPlace(type_name, order, start + offset, length)

    def _name(self, limit: int, what: str) -> str:
        length = int(self._number("Q"))
        if not 1 <= length <= limit:
            raise ValueError(f"a {what} of {length} bytes")
        start = self.at
        self._skip(length)
        return self.data[start : self.at].decode()

    def _number(self, letter: str) -> float:
        start = self.at
        self._skip(struct.calcsize(f"<{letter}"))
        value: float = struct.unpack_from(f"<{letter}", self.data, start)[0]
        return value

    def _skip(self, count: int) -> None:
        if count > self.limit - self.at:
            over = "the file ends" if self.limit == self.size else f"its metadata goes on past {self.limit / MB:.0f} MB"
            raise ValueError(f"at byte {self.at}, {count} bytes further, {over}")
        self.at += count
