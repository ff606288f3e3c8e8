"""Rows of a task's file (.jsonl, .jsonl.gz, a .json list, .parquet), each with the place to name when it is wrong."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qtool import QtoolError
from qtool.evaluate.problems import Problem

Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """("file:line", row) of one file. Raises QtoolError (exit 2) naming the line that cannot be read."""
    try:
        # The content, not the name, says what it is: downloads often lose their suffix.
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"PAR1":
            yield from _parquet(path)
        elif magic[:2] == b"\x1f\x8b":
            yield from parse_rows(str(path), path.read_bytes())
        else:
            yield from _plain(path, magic)
    except OSError as error:
        raise QtoolError(f"task file {path} cannot be read: {error.strerror or error}.") from error


def parse_rows(source: str, data: bytes) -> Iterator[tuple[str, Row]]:
    """The same for a JSONL file's bytes, gzip or not."""
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise QtoolError(f"{source}: damaged gzip file ({error}). Download it again.") from error
    except UnicodeDecodeError as error:
        raise QtoolError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
    # Not splitlines(): U+2028 and friends are legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{source}:{number}", _row(f"{source}:{number}", line)


def problem(where: str, fields: Row) -> Problem:
    """The fields as a Problem. Raises QtoolError (exit 2) naming every key at fault."""
    try:
        return Problem.model_validate(fields)
    except ValidationError as error:
        faults = "; ".join(
            f"key {'.'.join(str(part) for part in fault['loc'])!r}: {fault['msg']}" for fault in error.errors()
        )
        keys = "task_id, prompt, entry_point, canonical_solution, test, level"
        raise QtoolError(f"{where}: {faults}. A problem has the keys {keys} (level is optional).") from error


def text_of(where: str, row: Row, key: str) -> str:
    """``row[key]``, which must be text. Raises QtoolError naming the place, the key, and the keys that are there."""
    value = row.get(key)
    if isinstance(value, str):
        return value
    there = ", ".join(sorted(row))
    what = "is missing" if key not in row else f"is a {type(value).__name__}, not text"
    raise QtoolError(f"{where}: key {key!r} {what}. The row has {there}: is it this benchmark's own file?")


def texts_of(where: str, row: Row, key: str) -> list[str]:
    """``row[key]``, which must be a list of texts (absent or null: none)."""
    value = row.get(key)
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise QtoolError(f"{where}: key {key!r} is not a list of texts.")


def _plain(path: Path, magic: bytes) -> Iterator[tuple[str, Row]]:
    """Line by line, for files of gigabytes; a file that begins with ``[`` is one JSON list."""
    if magic.lstrip(b"\xef\xbb\xbf \r\n").startswith(b"["):
        rows = _json(str(path), path.read_text(encoding="utf-8-sig"))
        if not isinstance(rows, list):
            raise QtoolError(f"{path}: not a JSON list of problems.")
        for number, row in enumerate(rows):
            yield f"{path}[{number}]", _object(f"{path}[{number}]", row)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise QtoolError(f"{path}: not UTF-8 text ({error.reason} in line {number}).") from error
            if text.strip():
                yield f"{path}:{number}", _row(f"{path}:{number}", text)


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=32):
                for row in batch.to_pylist():
                    yield f"{path}[{number}]", row
                    number += 1
    except pyarrow.ArrowException as error:
        raise QtoolError(f"{path}: damaged parquet file ({error}). Download it again.") from error


def _row(where: str, line: str) -> Row:
    return _object(where, _json(where, line))


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QtoolError(f"{where}: not JSON ({error}). Each line must be one JSON object.") from error


def _object(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise QtoolError(f"{where}: a JSON {type(row).__name__}, not an object with the keys of a problem.")
    return row
