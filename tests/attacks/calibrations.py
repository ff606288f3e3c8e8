"""Calibration text in files as people have them, and as nobody should."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.bench import LACKS, TAKEN_OR_REFUSED, Attack, Bench

Write = Callable[[Path], Any]


def _bytes(data: bytes) -> Write:
    return lambda path: path.write_bytes(data)


def _rows(*rows: Any, times: int = 50) -> Write:
    return _bytes(("\n".join(json.dumps(row) for row in rows) + "\n").encode() * times)


def _parquet(columns: dict[str, list[Any]]) -> Write:
    def write(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)

    return write


def _bomb(path: Path) -> None:
    with gzip.open(path, "wb", 1) as file:
        for _ in range(1500):
            file.write(b" " * 2**20)


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 10**12)


USER = {"role": "user", "content": "hi"}
REFUSED: list[tuple[str, str, Write]] = [
    ("empty", "c.txt", _bytes(b"")),
    ("blank", "c.txt", _bytes(b" \n" * 1000)),
    ("Latin-1", "c.txt", _bytes("größe\n".encode("latin-1") * 100)),
    ("UTF-16", "c.txt", _bytes(("a line\n" * 100).encode("utf-16"))),
    ("random bytes", "c.txt", _bytes(bytes(range(256)) * 100)),
    ("a folder", "c.txt", lambda path: path.mkdir()),
    ("a pipe", "c.txt", lambda path: os.mkfifo(path)),
    ("a link to /dev/zero", "c.txt", lambda path: path.symlink_to("/dev/zero")),
    ("a link to nothing", "c.txt", lambda path: path.symlink_to("nothing")),
    ("a link to itself", "c.txt", lambda path: path.symlink_to(path)),
    ("a terabyte of holes", "c.txt", _sparse),
    ("too short", "c.txt", _bytes(b"a")),
    ("rows: empty file", "c.jsonl", _bytes(b"")),
    ("rows: no JSON", "c.jsonl", _bytes(b"hello\n")),
    ("rows: half", "c.jsonl", _bytes(b'{"text": "a"}\n{"text": "b')),
    ("rows: 100000 brackets", "c.jsonl", _bytes(b"[" * 100_000)),
    ("rows: numbers", "c.jsonl", _rows(7)),
    ("rows: lists", "c.jsonl", _rows([1])),
    ("rows: null", "c.jsonl", _rows(None)),
    ("rows: without text", "c.jsonl", _rows({"foo": "bar"})),
    ("rows: text null", "c.jsonl", _rows({"text": None})),
    ("rows: text a number", "c.jsonl", _rows({"text": 7})),
    ("rows: text empty", "c.jsonl", _rows({"text": ""})),
    ("rows: text blank", "c.jsonl", _rows({"text": " \n"})),
    ("rows: messages text", "c.jsonl", _rows({"messages": "hi"})),
    ("rows: messages empty", "c.jsonl", _rows({"messages": []})),
    ("rows: messages of numbers", "c.jsonl", _rows({"messages": [1]})),
    ("rows: message without role", "c.jsonl", _rows({"messages": [{"content": "x"}]})),
    ("rows: content a map", "c.jsonl", _rows({"messages": [{"role": "user", "content": {"a": 1}}]})),
    ("rows: not UTF-8", "c.jsonl", _bytes(b'{"text": "\xff"}\n' * 50)),
    ("rows: a folder", "c.jsonl", lambda path: path.mkdir()),
    ("rows: a pipe", "c.jsonl", lambda path: os.mkfifo(path)),
    ("parquet: empty", "c.parquet", _bytes(b"")),
    ("parquet: garbage", "c.parquet", _bytes(b"PAR1" + b"\xff" * 100 + b"PAR1")),
    ("parquet: a text", "c.parquet", _bytes(b"hello")),
    ("parquet: other columns", "c.parquet", _parquet({"foo": [1, 2]})),
    ("parquet: null texts", "c.parquet", _parquet({"text": [None, None]})),
    ("parquet: no rows", "c.parquet", _parquet({"text": []})),
    ("parquet: numbers", "c.parquet", _parquet({"text": [1, 2, 3]})),
    ("gzip: garbage", "c.jsonl.gz", _bytes(b"\x1f\x8b" + b"\xff" * 100)),
    ("gzip: cut", "c.jsonl.gz", _bytes(gzip.compress(b'{"text": "abc"}\n' * 1000)[:-20])),
    ("a program", "c.py", lambda path: path.mkdir()),
    ("missing", "c.txt", lambda path: None),
    ("pickle", "c.pkl", _bytes(b"\x80\x04.")),
]
TAKEN: list[tuple[str, str, Write]] = [
    ("one line of 30 MB", "c.txt", _bytes(b"a" * 30_000_000)),
    ("NULs", "c.txt", _bytes(bytes(100_000))),
    ("terminal codes", "c.txt", _bytes(b"\x1b[2J\x07" * 10_000)),
    ("a byte order mark", "c.txt", _bytes("\ufeffdef f():\n    pass\n".encode() * 300)),
    ("lines of Windows", "c.txt", _bytes(b"def f():\r\n    pass\r\n" * 300)),
    ("content null", "c.jsonl", _rows({"messages": [USER, {"role": "assistant", "content": None}]})),
    (
        "content parts",
        "c.jsonl",
        _rows({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 50}]}]}),
    ),
    ("an unknown role", "c.jsonl", _rows({"messages": [{"role": "evil", "content": "x" * 50}]})),
    ("10**5 messages", "c.jsonl", _rows({"messages": [USER] * 10**5}, times=1)),
    ("surrogates", "c.jsonl", _bytes(b'{"text": "abc \\ud800 def"}\n' * 100)),
    ("gzip bomb", "c.txt.gz", _bomb),
    ("gzip bomb of rows", "c.jsonl.gz", _bomb),
]


def _attack(name: str, write: Write) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        write(work / name)
        section = {"text": str(work / name), "samples": 2, "length": 16}
        return bench.recipe(work, calibration=section, outputs=[{"method": "gptq", "group_size": 32}])

    return build


def attacks() -> list[Attack]:
    found = [Attack("calibration", name, _attack(file, write), names=(file,)) for name, file, write in REFUSED[:-2]]
    found += [Attack("calibration", name, _attack(file, write), LACKS) for name, file, write in REFUSED[-2:]]
    return found + [Attack("calibration", name, _attack(file, write), TAKEN_OR_REFUSED) for name, file, write in TAKEN]
