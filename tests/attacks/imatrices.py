"""Importance matrices, in llama.cpp's old .dat and in GGUF."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.bench import Attack, Bench

LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NAMES = {f"blk.{layer}.{kind}.weight": 256 if kind == "ffn_down" else 128 for layer in (0, 1) for kind in LINEARS}


def _dat(rows: dict[str, list[float]], calls: int = 1) -> bytes:
    found = struct.pack("<i", len(rows))
    for name, row in rows.items():
        found += struct.pack("<i", len(name)) + name.encode() + struct.pack(f"<ii{len(row)}f", calls, len(row), *row)
    return found


def _all(value: float, columns: int = 0) -> dict[str, list[float]]:
    return {name: [value] * (columns or n) for name, n in NAMES.items()}


def _one(name: str, value: float) -> dict[str, list[float]]:
    return _all(1.0) | {name: [value] * NAMES[name]}


def _bomb(kind: int, count: int) -> bytes:
    key = b"general.x"
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<IIQ", 9, kind, count)


def _gguf(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import gguf
        import numpy

        tensors: dict[str, Any] = {}
        for name, columns in NAMES.items():
            tensors[f"{name}.in_sum2"] = numpy.ones((1, columns), dtype=numpy.float32)
            tensors[f"{name}.counts"] = numpy.ones((1, 1), dtype=numpy.float32)
        change(tensors)
        writer = gguf.GGUFWriter(path, "imatrix")
        writer.add_type("imatrix")
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


FIRST = "blk.0.ffn_down.weight"
FILES: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("three bytes", b"abc"),
    ("zeros", bytes(1000)),
    ("0 entries", struct.pack("<i", 0)),
    ("-1 entries", struct.pack("<i", -1)),
    ("10**6 entries of nothing", struct.pack("<i", 10**6)),
    ("a name of 2**31 - 1 bytes", struct.pack("<ii", 1, 2**31 - 1)),
    ("a name of -1 bytes", struct.pack("<ii", 1, -1)),
    ("a name that is not UTF-8", struct.pack("<ii", 1, 2) + b"\xff\xfe" + struct.pack("<iif", 1, 1, 1.0)),
    ("2**31 - 1 values", struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1)),
    ("-1 values", struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, -1)),
    ("another model's names", _dat({"x.weight": [1.0] * 128})),
    ("another width", _dat(_all(1.0, 96))),
    ("NaN", _dat(_all(float("nan")))),
    ("Inf", _dat(_all(float("inf")))),
    ("negative", _dat(_all(-1.0))),
    ("one matrix of NaN", _dat(_one(FIRST, float("nan")))),
    ("one matrix of zeros", _dat(_one(FIRST, 0.0))),
    ("zeros throughout", _dat(_all(0.0))),
    ("half", _dat(_all(1.0))[:2000]),
    ("GGUF: empty", b"GGUF" + struct.pack("<IQQ", 3, 0, 0)),
    ("GGUF: 2**60 tensors", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0)),
    ("GGUF: 2**60 keys", b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60)),
    ("GGUF: 2**62 bytes", _bomb(0, 2**62)),
    ("GGUF: 2**62 texts", _bomb(8, 2**62)),
    ("GGUF: version 99", b"GGUF" + struct.pack("<IQQ", 99, 0, 0)),
]


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name] * 0 + value

    return change


WRITTEN: list[tuple[str, Callable[[Path], None]]] = [
    ("GGUF: a matrix of zeros", _gguf(_set(f"{FIRST}.in_sum2", 0.0))),
    ("GGUF: a matrix of NaN", _gguf(_set(f"{FIRST}.in_sum2", float("nan")))),
    ("GGUF: a negative count", _gguf(_set(f"{FIRST}.counts", -1.0))),
    ("GGUF: a count of NaN", _gguf(_set(f"{FIRST}.counts", float("nan")))),
    ("GGUF: counts left out", _gguf(lambda tensors: tensors.pop(f"{FIRST}.counts") and None)),
]


def _attack(write: Callable[[Path], Any]) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        path = work / "imatrix.dat"
        write(path)
        return bench.recipe(work, outputs=[{"method": "gguf", "type": "Q4_K_M", "imatrix": str(path)}])

    return build


def _bytes(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def attacks() -> list[Attack]:
    found = [Attack("imatrix", name, _attack(_bytes(data)), names=("imatrix.dat",)) for name, data in FILES]
    found += [Attack("imatrix", name, _attack(write), names=("imatrix.dat",)) for name, write in WRITTEN]
    missing = Attack("imatrix", "missing", _attack(lambda path: None), names=("imatrix.dat",))
    return [*found, missing, Attack("imatrix", "a folder", _attack(lambda path: path.mkdir()), names=("imatrix.dat",))]
