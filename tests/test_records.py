"""Rows of files as strangers write them: read rightly, or refused naming file and row, within limits."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from qtool import QtoolError
from qtool.convert.text import records
from qtool.convert.text.records import parse_records, read_beginning, read_records

ROWS = [{"text": "a, [b]"}, {"text": "ünï\u2028"}, {"text": ""}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


@pytest.mark.parametrize(
    ("name", "data", "places"),
    [
        ("a.jsonl", LINES, [":1", ":2", ":3"]),
        ("a.JSONL.GZ", gzip.compress(LINES, mtime=0), [":1", ":2", ":3"]),
        ("no suffix", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n"), [":1", ":3", ":5"]),
        ("a.json", json.dumps(ROWS).encode(), ["[0]", "[1]", "[2]"]),
        ("a.json", b"\xef\xbb\xbf\n " + json.dumps(ROWS, indent=3).encode() + b"\n", ["[0]", "[1]", "[2]"]),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0), ["[0]", "[1]", "[2]"]),
        ("a.csv", 'text\n"a, [b]"\nünï\u2028\n""\n'.encode(), [":2", ":3", ":4"]),
        ("a.TSV", 'text\n"a, [b]"\nünï\u2028\n""\n'.encode(), [":2", ":3", ":4"]),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, data: bytes, places: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert list(read_records(path)) == [(f"{path}{place}", row) for place, row in zip(places, ROWS, strict=True)]


def test_a_list_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = [{"text": "é" * size, "n": [size, -1.5e3]} for size in range(40)] + [12345678, "x", None]
    monkeypatch.setattr(records, "_PIECE", 7)  # every cut there can be: in a letter, a number, an escape
    for data in (json.dumps(rows), json.dumps(rows, ensure_ascii=False, indent=1), "[]", " [ ] "):
        assert [row for _, row in parse_records("x", io.BytesIO(data.encode()))] == json.loads(data)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.json", b'[{"a": 1} {"a": 2}]', r"a.json\[0\]: not JSON .*follows it"),
        ("a.json", b'[{"a": 1}, {"a": ]', r"a.json\[1\]: not JSON"),
        ("a.json", b'[{"a": 1}', r"a.json\[0\]: not JSON .*no end"),
        ("a.json", b"[1] 2", "something follows the list"),
        ("a.json", b"[" * 10**6, r"a.json\[0\]: not JSON"),
        ("a.jsonl", b'{"a": 1}\n' + b'{"a": ' + b"[" * 10**5, "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}', "a.jsonl:2: is not UTF-8"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "a.jsonl:1: is UTF-16"),
        ("a.json", b'[{"a": "caf\xe9"}]', "a.json: not UTF-8"),
        ("a.csv", b'text\n"never ends', r"a.csv:2: not CSV|unexpected end"),
        ("a.csv", b"text\na,b\n", "a.csv:2: a row with more cells"),
        ("a.gz", gzip.compress(LINES, mtime=0)[:-9], "damaged gzip"),
        ("a.gz", gzip.compress(LINES, mtime=0)[:-6] + b"junk!!", "damaged gzip"),
        ("a.parquet", b"PAR1" + b"\xff" * 64 + b"PAR1", "damaged parquet"),
        ("a.parquet", b"PAR1", "damaged parquet"),
    ],
)
def test_what_is_damaged_is_named(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(QtoolError, match=said) as caught:
        list(read_records(path))
    assert caught.value.exit_code == 2
    assert str(path) in caught.value.message


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "ROW_LIMIT", 1000)
    monkeypatch.setattr(records, "ROWS_LIMIT", 50)
    monkeypatch.setattr(records, "PARTS_LIMIT", 100)
    monkeypatch.setattr(records, "_PIECE", 64)
    for data, said in (
        (b" " * 5000, ":1: a line of more than"),
        (b"\n" * 100, "more than 50 rows"),
        (b"[" + b"1," * 60, "more than 50 rows|more than 100 values"),
        (b'{"a": [' + b"[]," * 200, ":1: a row of more than 100 values"),
        (b'["' + b"x" * 5000, r"\[0\]: not JSON \(more than"),
    ):
        with pytest.raises(QtoolError, match=said):
            list(parse_records("f", io.BytesIO(gzip.compress(data, mtime=0))))
        with pytest.raises(QtoolError, match=said):
            list(parse_records("f", io.BytesIO(data)))


def test_parquet_of_other_columns_and_numbers(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.bin"  # the content says what it is
    parquet.write_table(pyarrow.table({"text": ["a", None], "n": [1, 2]}), path)
    assert list(read_records(path)) == [(f"{path}[0]", {"text": "a", "n": 1}), (f"{path}[1]", {"text": None, "n": 2})]
    places = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0")
    bad = pyarrow.StringArray.from_buffers(2, places, pyarrow.py_buffer(b"\xff\xfe"))
    parquet.write_table(pyarrow.table({"text": bad}), path)
    with pytest.raises(QtoolError, match="damaged parquet"):
        list(read_records(path))


def test_the_beginning_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes("aé漢🙂".encode())
    assert [read_beginning(path, n) for n in (1, 2, 3, 4, 6, 9, 10, 99)] == [
        "", "a", "a", "aé", "aé", "aé漢", "aé漢", "aé漢🙂",
    ]  # fmt: skip
    path.write_bytes(gzip.compress(b"x = 1\n" * 1000, mtime=0))
    assert read_beginning(path, 7) == "x = 1\n"
    for data, said in ((b"a\0b", "null characters"), (b"a\xe9", "byte 1: 0xe9"), (b"\xff\xfea\0", "UTF-16")):
        path.write_bytes(data)
        with pytest.raises(QtoolError, match=said):
            read_beginning(path, 99)
