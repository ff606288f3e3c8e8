"""Weight files: torn, lying headers, other formats under their name, numbers that are none."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.bench import EMBEDDING, REFUSED, Attack, Bench, Build, read_header, write_header

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
Change = Callable[[dict[str, Any]], Any]


class _Runs:
    """What a pickle does when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path, Bench], None]:
    return lambda file, _: file.write_bytes(change(file.read_bytes())) and None


def _header(change: Change) -> Callable[[Path, Bench], None]:
    def damage(file: Path, _: Bench) -> None:
        header, data = read_header(file)
        change(header)
        write_header(file, header, data)

    return damage


def _raw(text: bytes | Callable[[dict[str, Any]], bytes]) -> Callable[[Path, Bench], None]:
    def damage(file: Path, _: Bench) -> None:
        header, data = read_header(file)
        write_header(file, text if isinstance(text, bytes) else text(header), data)

    return damage


def _twice(header: dict[str, Any]) -> bytes:
    entry = json.dumps({EMBEDDING: header[EMBEDDING]})[1:-1]
    return json.dumps(header).encode()[:-1] + f",{entry}}}".encode()


def _fill(name: str, pattern: bytes) -> Callable[[Path, Bench], None]:
    def damage(file: Path, _: Bench) -> None:
        header, data = read_header(file)
        start, end = header[name]["data_offsets"]
        filled = (pattern * ((end - start) // len(pattern) + 1))[: end - start]
        write_header(file, header, data[:start] + filled + data[end:])

    return damage


def _swap(header: dict[str, Any]) -> None:
    header[Q]["data_offsets"], header[NORM]["data_offsets"] = header[NORM]["data_offsets"], header[Q]["data_offsets"]


def _rename(old: str, new: str) -> Change:
    return lambda header: header.update({new: header.pop(old)})


def _prefix(prefix: str) -> Change:
    def change(header: dict[str, Any]) -> None:
        for name in [name for name in header if name != "__metadata__"]:
            header[prefix + name] = header.pop(name)

    return change


GHOST = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
HEADERS: list[tuple[str, Callable[[Path, Bench], None]]] = [
    ("empty", _bytes(lambda raw: b"")),
    ("seven bytes", _bytes(lambda raw: raw[:7])),
    ("eight bytes", _bytes(lambda raw: raw[:8])),
    ("half a header", _bytes(lambda raw: raw[:100])),
    ("half", _bytes(lambda raw: raw[: len(raw) // 2])),
    ("one byte short", _bytes(lambda raw: raw[:-1])),
    ("one byte more", _bytes(lambda raw: raw + b"x")),
    ("header length 0", _bytes(lambda raw: bytes(8) + raw[8:])),
    ("header length 2**63", _bytes(lambda raw: struct.pack("<Q", 2**63) + raw[8:])),
    ("header length 2**64 - 1", _bytes(lambda raw: b"\xff" * 8 + raw[8:])),
    ("header length 99 MB", _bytes(lambda raw: struct.pack("<Q", 99 * 10**6) + raw[8:])),
    ("header length big-endian", _bytes(lambda raw: raw[:8][::-1] + raw[8:])),
    ("an HTML page", _bytes(lambda raw: b"<!DOCTYPE html><title>404</title>")),
    (
        "a pointer of Git LFS",
        _bytes(lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
    ),
    ("a zip file", _bytes(lambda raw: b"PK\x03\x04" + raw)),
    ("zeros", _bytes(lambda raw: bytes(4096))),
    ("a GGUF file", _bytes(lambda raw: b"GGUF" + struct.pack("<IQQ", 3, 0, 0))),
    ("pickle", lambda file, bench: file.write_bytes(pickle.dumps(_Runs(bench.canary))) and None),
    ("header is a list", _raw(b"[]")),
    ("header is null", _raw(b"null")),
    ("header is a number", _raw(b"1e999")),
    ("header is not UTF-8", _raw(b'{"\xff": 1}')),
    ("header of 100000 brackets", _raw(b"[" * 100_000)),
    ("header is empty", _raw(b"{}")),
    ("header is NaN", _raw(b'{"a": NaN}')),
    ("a tensor twice", _raw(_twice)),
    ("offsets beyond the file", _header(lambda h: h[Q].update(data_offsets=[10**9, 10**9 + 32768]))),
    ("offsets negative", _header(lambda h: h[Q].update(data_offsets=[-8, 8]))),
    ("offsets reversed", _header(lambda h: h[Q]["data_offsets"].reverse())),
    ("offsets of another tensor", _header(lambda h: h[Q].update(data_offsets=h[NORM]["data_offsets"]))),
    ("offsets swapped", _header(_swap)),
    ("offsets of three", _header(lambda h: h[Q]["data_offsets"].append(9))),
    ("offsets as text", _header(lambda h: h[Q].update(data_offsets=["0", "9"]))),
    ("offsets missing", _header(lambda h: h[Q].pop("data_offsets"))),
    ("a hole between tensors", _header(lambda h: h.pop(NORM))),
    ("dtype a number", _header(lambda h: h[Q].update(dtype=7))),
    ("dtype unknown", _header(lambda h: h[Q].update(dtype="F4_EVIL"))),
    ("dtype missing", _header(lambda h: h[Q].pop("dtype"))),
    ("dtype I16", _header(lambda h: h[Q].update(dtype="I16"))),
    ("dtype U16", _header(lambda h: h[Q].update(dtype="U16"))),
    ("dtype F8_E4M3 of twice the columns", _header(lambda h: h[Q].update(dtype="F8_E4M3", shape=[128, 256]))),
    ("dtype BOOL", _header(lambda h: h[Q].update(dtype="BOOL", shape=[128, 256]))),
    ("shape transposed", _header(lambda h: h[EMBEDDING].update(shape=h[EMBEDDING]["shape"][::-1]))),
    ("shape flat", _header(lambda h: h[EMBEDDING].update(shape=[320 * 128]))),
    ("shape of 200 ones", _header(lambda h: h[NORM].update(shape=[1] * 200 + [128]))),
    ("shape 2**63", _header(lambda h: h[Q].update(shape=[2**63, 2]))),
    ("shape negative", _header(lambda h: h[Q].update(shape=[-128, -128]))),
    ("shape a fraction", _header(lambda h: h[Q].update(shape=[128.5, 128]))),
    ("shape text", _header(lambda h: h[Q].update(shape="128x128"))),
    ("shape missing", _header(lambda h: h[Q].pop("shape"))),
    ("a ghost inside a layer", _header(lambda h: h.update({"model.layers.0.ghost": GHOST}))),
    ("a layer too many", _header(lambda h: h.update({"model.layers.2.mlp.up_proj.weight": GHOST}))),
    ("a layer called -1", _header(lambda h: h.update({"model.layers.-1.mlp.up_proj.weight": GHOST}))),
    ("a name of 100000 letters", _header(lambda h: h.update({"model.layers.0." + "a" * 100_000: GHOST}))),
    ("another name", _header(_rename(Q, "model.layers.0.self_attn.query.weight"))),
    ("names under base_model", _header(_prefix("base_model.model."))),
    ("names under _orig_mod", _header(_prefix("_orig_mod."))),
]
CONTENTS: list[tuple[str, Callable[[Path, Bench], None]]] = [
    ("a matrix of NaN", _fill(Q, b"\xff\xff")),
    ("a matrix with Inf", _fill(Q, b"\x80\x7f")),
    ("an embedding of NaN", _fill(EMBEDDING, b"\xc0\x7f")),
    ("a norm of Inf", _fill(NORM, b"\x80\xff")),
]


def _attack(damage: Callable[[Path, Bench], None], command: str) -> Build:
    def build(bench: Bench, work: Path) -> list[str]:
        model = bench.model(work)
        damage(model / "model.safetensors", bench)
        if command == "evaluate":
            return bench.evaluate(model)
        if command == "plan":
            return ["plan", str(model)]
        if command == "verify --source":
            return ["verify", str(bench.root / "artifacts" / "model-awq"), "--source", str(model)]
        words = bench.recipe(work, model=str(model))
        return [*words, "--dry-run"] if command == "run --dry-run" else words

    return build


def attacks() -> list[Attack]:
    """Every damage of a header by the dry run and, in turn, by another command."""
    commands = ("run", "evaluate", "plan", "verify --source")
    found = [Attack("safetensors", name, _attack(damage, "run --dry-run")) for name, damage in HEADERS]
    for number, (name, damage) in enumerate(HEADERS):
        command = commands[number % len(commands)]
        codes = frozenset({1, 2}) if command == "verify --source" else REFUSED
        if command == "plan" or name.startswith(("dtype", "offsets swapped")):  # plan reads shapes, not every name
            codes |= {0}
        found.append(Attack("safetensors", f"{name}, {command}", _attack(damage, command), codes))
    for name, damage in CONTENTS:
        found.append(Attack("safetensors", name, _attack(damage, "run"), frozenset({2, 3})))
    return found
