"""GGUF artifacts: counts without end, types of none, texts without end, other orders of bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from attacks.bench import Attack, Bench, sign

Edit = Callable[[bytes], bytes]
MAGIC = b"GGUF"


def _at(offset: int, value: int, form: str = "<Q") -> Edit:
    return lambda raw: raw[:offset] + struct.pack(form, value) + raw[offset + struct.calcsize(form) :]


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _keys(*pairs: bytes, tensors: int = 0, rest: bytes = b"") -> Edit:
    return lambda raw: MAGIC + struct.pack("<IQQ", 3, tensors, len(pairs)) + b"".join(pairs) + rest


def _array(kind: int, count: int, data: bytes = b"") -> bytes:
    return _text(b"general.x") + struct.pack("<IIQ", 9, kind, count) + data


def _tensor(dims: int, shape: tuple[int, ...], kind: int, offset: int, name: bytes = b"t") -> bytes:
    return (
        _text(name)
        + struct.pack("<I", dims)
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


ARCHITECTURE = _text(b"general.architecture") + struct.pack("<I", 8) + _text(b"llama")
NESTED = _text(b"general.x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
TABLE: list[tuple[str, Edit]] = [
    ("empty", lambda raw: b""),
    ("magic alone", lambda raw: MAGIC),
    ("other magic", lambda raw: b"GGML" + raw[4:]),
    ("version 0", _at(4, 0, "<I")),
    ("version 1", _at(4, 1, "<I")),
    ("version 99", _at(4, 99, "<I")),
    ("big-endian", _at(4, 3, ">I")),
    ("tensors 2**60", _at(8, 2**60)),
    ("tensors 2**64 - 1", _at(8, 2**64 - 1)),
    ("tensors 0", _at(8, 0)),
    ("keys 2**60", _at(16, 2**60)),
    ("keys 0", _at(16, 0)),
    ("keys 2**64 - 1", _at(16, 2**64 - 1)),
    ("a key of 2**63 letters", _at(24, 2**63)),
    ("cut in the header", lambda raw: raw[:1000]),
    ("cut in the data", lambda raw: raw[:-1000]),
    ("half", lambda raw: raw[: len(raw) // 2]),
    ("zeros behind the header", lambda raw: raw[:24] + bytes(len(raw) - 24)),
    ("no tensors, no keys", _keys()),
    ("array: 2**62 bytes", _keys(_array(0, 2**62))),
    ("array: 2**62 texts", _keys(_array(8, 2**62))),
    ("array: 2**62 floats", _keys(_array(6, 2**62))),
    ("array: 2**62 arrays", _keys(_array(9, 2**62))),
    ("array: of a type of none", _keys(_array(99, 4, bytes(64)))),
    ("array: 3 * 10**7 bytes", _keys(_array(0, 3 * 10**7, bytes(3 * 10**7)))),
    ("array: 10**6 empty texts", _keys(_array(8, 10**6, bytes(8 * 10**6)))),
    ("arrays in 5000 arrays", _keys(NESTED)),
    ("a type of none", _keys(_text(b"general.x") + struct.pack("<I", 99))),
    ("a text of 2**62 letters", _keys(_text(b"general.x") + struct.pack("<IQ", 8, 2**62))),
    ("a text that is not UTF-8", _keys(_text(b"general.x") + struct.pack("<I", 8) + _text(b"\xff\xfe"))),
    ("a key twice", _keys(ARCHITECTURE, ARCHITECTURE)),
    ("an empty key", _keys(_text(b"") + struct.pack("<IQ", 10, 1))),
    ("a key that is not UTF-8", _keys(_text(b"\xff") + struct.pack("<IQ", 10, 1))),
    ("alignment 3", _keys(_text(b"general.alignment") + struct.pack("<II", 4, 3))),
    ("alignment 0", _keys(_text(b"general.alignment") + struct.pack("<II", 4, 0))),
    ("alignment 2**31", _keys(_text(b"general.alignment") + struct.pack("<II", 4, 2**31))),
    ("alignment a text", _keys(_text(b"general.alignment") + struct.pack("<I", 8) + _text(b"x"))),
    ("tensor: 2**32 - 1 dimensions", _keys(tensors=1, rest=_tensor(2**32 - 1, (), 0, 0))),
    ("tensor: 0 dimensions", _keys(ARCHITECTURE, tensors=1, rest=_tensor(0, (), 0, 0) + bytes(64))),
    ("tensor: a type of none", _keys(tensors=1, rest=_tensor(1, (32,), 99, 0) + bytes(64))),
    ("tensor: 2**63 wide", _keys(tensors=1, rest=_tensor(1, (2**63,), 0, 0) + bytes(64))),
    ("tensor: sizes that overflow", _keys(tensors=1, rest=_tensor(4, (2**32, 2**32, 2**32, 2**32), 0, 0) + bytes(64))),
    ("tensor: 0 wide", _keys(ARCHITECTURE, tensors=1, rest=_tensor(2, (0, 32), 0, 0) + bytes(64))),
    ("tensor: no whole block", _keys(tensors=1, rest=_tensor(1, (33,), 12, 0) + bytes(64))),
    ("tensor: beyond the file", _keys(tensors=1, rest=_tensor(1, (32,), 0, 2**40) + bytes(64))),
    ("tensor: off the alignment", _keys(tensors=1, rest=_tensor(1, (32,), 0, 7) + bytes(256))),
    ("tensor: a name of 10**6 letters", _keys(tensors=1, rest=_tensor(1, (32,), 0, 0, b"a" * 10**6) + bytes(256))),
    ("tensor: twice", _keys(tensors=2, rest=_tensor(1, (8,), 0, 0) * 2 + bytes(256))),
    ("a JSON file", lambda raw: b'{"GGUF": 3}'),
    ("a safetensors file", lambda raw: struct.pack("<Q", 2) + b"{}"),
]


def _attack(edit: Edit, command: str) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        folder = bench.artifact(work, "q8")
        file = next(path for path in folder.glob("*.gguf") if path.name != "imatrix.gguf")
        file.write_bytes(edit(file.read_bytes()))
        sign(folder)
        if command == "verify":
            return ["verify", str(folder)]
        return bench.evaluate(folder, "--engine", command)

    return build


def attacks() -> list[Attack]:
    found = []
    for number, (name, edit) in enumerate(TABLE):
        found.append(Attack("gguf", name, _attack(edit, "verify"), frozenset({1, 2})))
        engine = "llama.cpp" if number % 2 else "reference"
        found.append(Attack("gguf", f"{name}, evaluate by {engine}", _attack(edit, engine), frozenset({2, 3})))
    return found
