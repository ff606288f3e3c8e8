"""Task files: problems that are none, sizes that are none, code where there should be words."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.bench import LACKS, Attack, Bench

ROW: dict[str, Any] = {
    "task_id": "t/0",
    "prompt": 'def f(x: int) -> int:\n    """Do it."""\n',
    "entry_point": "f",
    "canonical_solution": "    return x + 1000\n",
    "test": "def check(candidate):\n    assert candidate(1) == 1001\n",
}
KEYS: list[tuple[str, Any]] = [("null", None), ("a number", 7), ("a list", ["x"]), ("a map", {"a": 1}), ("empty", "")]
ODD: list[tuple[str, dict[str, Any]]] = [
    ("entry_point that is code", {"entry_point": "f;__import__('os').system('touch CANARY')"}),
    ("entry_point a keyword", {"entry_point": "class"}),
    ("prompt that runs", {"prompt": "open('CANARY', 'w')\ndef f(x: int) -> int:\n    '''Do it.'''\n"}),
    ("test that reaches the checker", {"test": "import sys\nsys.exit(0)\ndef check(candidate): pass\n"}),
    ("test without end", {"test": "def check(candidate):\n    while True: pass\n"}),
    ("test that always passes", {"test": "def check(candidate):\n    candidate(1)\n"}),
    ("test that is no Python", {"test": "def check(:"}),
    ("test without check", {"test": "x = 1"}),
    ("solution that fails", {"canonical_solution": "    return x\n"}),
    ("solution of 10**5 signs", {"canonical_solution": "    return " + "-" * 10**5 + "1\n"}),
    ("solution of 5000 brackets", {"canonical_solution": "    return " + "(" * 5000 + "1" + ")" * 5000 + "\n"}),
    ("solution that ends the process", {"canonical_solution": "    import os; os._exit(0)\n"}),
    ("solution that takes memory", {"canonical_solution": "    return len('x' * 10**11)\n"}),
    ("solution that forks", {"canonical_solution": "    import os\n    while True: os.fork()\n"}),
    ("solution that prints", {"canonical_solution": "    while True: print('x' * 10**6)\n"}),
    ("prompt with NUL", {"prompt": "def f(x):\n    '''\0'''\n"}),
    ("prompt with a surrogate", {"prompt": "def f(x):\n    '''\ud800'''\n"}),
    ("prompt longer than the context", {"prompt": "# " + "ab cd " * 2000 + "\ndef f(x):\n"}),
    ("prompt of 20 MB", {"prompt": "# " + "a" * 20_000_000 + "\ndef f(x):\n"}),
    ("task_id with terminal codes", {"task_id": "a\n\x1b[2Jb"}),
    ("task_id of 10**6 letters", {"task_id": "a" * 10**6}),
    ("seconds NaN", {"seconds": float("nan")}),
    ("seconds 1e300", {"seconds": 1e300}),
    ("seconds -1", {"seconds": -1}),
    ("level NaN", {"level": float("nan")}),
    ("libraries unknown", {"libraries": ["antigravity"]}),
    ("libraries text", {"libraries": "numpy"}),
    ("an unknown key", {"evil": 1}),
]
GOOD = json.dumps(ROW).encode()
FILES: list[tuple[str, str, bytes]] = [
    ("empty", "t.jsonl", b""),
    ("blank", "t.jsonl", b"\n \n"),
    ("no JSON", "t.jsonl", b"hello"),
    ("half", "t.jsonl", GOOD[:-20]),
    ("a number", "t.jsonl", b"7"),
    ("a list", "t.jsonl", b"[]"),
    ("NULs", "t.jsonl", bytes(100)),
    ("not UTF-8", "t.jsonl", GOOD.replace(b"Do it", b"\xff")),
    ("100000 brackets", "t.jsonl", b'{"task_id":' + b"[" * 100_000),
    ("UTF-16", "t.jsonl", GOOD.decode().encode("utf-16")),
    ("one id twice", "t.jsonl", GOOD + b"\n" + GOOD),
    ("a parquet of garbage", "t.parquet", b"PAR1" + b"\xff" * 99 + b"PAR1"),
    ("gzip of garbage", "t.jsonl.gz", b"\x1f\x8b" + b"\xff" * 99),
    ("gzip, cut", "t.jsonl.gz", gzip.compress(GOOD)[:-9]),
    ("another suffix", "t.exe", GOOD),
    ("csv", "t.csv", b"a,b\n1,2\n"),
    ("HTML", "t.json", b"<html>"),
    ("1e999", "t.jsonl", GOOD[:-1] + b', "seconds": 1e999}'),
    ("a number of 10000 digits", "t.jsonl", b'{"a": ' + b"9" * 10_000 + b"}"),
]


def _file(name: str, write: Callable[[Path], Any]) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        write(work / name)
        model = str(bench.root / "model")
        return ["evaluate", model, "--task", str(work / name), "--max-new-tokens", "4", "--limit", "3"]

    return build


def _row(change: dict[str, Any]) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        text = json.dumps(ROW | change).replace("CANARY", str(bench.canary))
        return _file("t.jsonl", lambda path: path.write_text(text))(bench, work)

    return build


def _bomb(path: Path) -> None:
    with gzip.open(path, "wb", 1) as file:
        for _ in range(2000):
            file.write(b" " * 2**20)


def _writes(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def attacks() -> list[Attack]:
    answers = frozenset({0, 2, 3})
    found = [Attack("task", f"{key} {name}", _row({key: value}), answers) for key in ROW for name, value in KEYS]
    found += [Attack("task", name, _row(change), answers) for name, change in ODD]
    harmless = ("another suffix", "1e999")  # rows are rows, and nobody asks for the key
    found += [
        Attack("task", f"file: {name}", _file(file, _writes(data)), LACKS | {0} if name in harmless else LACKS)
        for name, file, data in FILES
    ]
    specials: list[tuple[str, str, Callable[[Path], Any]]] = [
        ("a pipe", "t.jsonl", os.mkfifo),
        ("a folder", "t.jsonl", os.mkdir),
        ("a gzip bomb", "t.jsonl.gz", _bomb),
        ("/dev/zero", "t.jsonl", lambda path: path.symlink_to("/dev/zero")),
        ("missing", "t.jsonl", lambda path: None),
    ]
    return found + [Attack("task", name, _file(file, write), LACKS) for name, file, write in specials]
