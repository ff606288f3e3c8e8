"""Rows of a file, each with the place to name when it is wrong: JSON lines, a JSON list, CSV, parquet; gzip or not.

Calibration text and the problems of tasks are read by this one reader. Nothing here trusts a size that a file claims:
what is decompressed, one row, and the number of rows have limits.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from qtool import QtoolError
from qtool.convert.files.reading import MB, decoded, open_file

ROW_LIMIT = 256 * MB  # one row of JSON: LiveCodeBench's tests make rows of 60 MB
ROWS_LIMIT = 10_000_000
PARTS_LIMIT = 20_000_000
PARQUET_LIMIT = 4096 * MB  # what the columns of one row group say they need
_PIECE = 2**20
_PACKED = b"\x1f\x8b"
_DAMAGED = (OSError, EOFError, zlib.error)
Placed = tuple[str, Any]


def read_records(path: Path) -> Iterator[Placed]:
    """("file:line" or "file[index]", value) of each row, whatever JSON value that is.

    The content, not the name, says what it is (downloads lose their suffix); only CSV is known by its name. Raises
    QtoolError (exit 2) naming the file and the row that cannot be read.
    """
    with open_file(path) as file:
        try:
            packed = file.peek(4)[:4] if isinstance(file, io.BufferedReader) else b""
        except OSError as error:
            raise _damaged(str(path), error) from error
        if packed == b"PAR1":
            yield from _parquet(path)
        elif suffix(path) in (".csv", ".tsv"):
            yield from _csv(str(path), file, "\t" if suffix(path) == ".tsv" else ",")
        else:
            yield from parse_records(str(path), file)


def parse_records(source: str, file: BinaryIO) -> Iterator[Placed]:
    """The same for an open file of JSON, gzip or not."""
    with _unpacked(file) as stream:
        try:
            head = stream.peek(_PIECE)[:_PIECE]
            if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                yield from _items(source, stream)
            else:
                yield from _lines(source, stream)
        except _DAMAGED as error:
            raise _damaged(source, error) from error


def read_beginning(path: Path, limit: int) -> str:
    """The first ``limit`` bytes of a text file, gzip or not. Raises QtoolError for what is no UTF-8 text."""
    try:
        with open_file(path) as file, _unpacked(file) as stream:
            data = stream.read(limit)
    except _DAMAGED as error:
        raise _damaged(str(path), error) from error
    if b"\0" in data[:_PIECE] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise QtoolError(f"{path}: holds null characters (the first is byte {data.index(0)}): it is no UTF-8 text.")
    if len(data) == limit:  # a cut inside a character is no fault of the file
        while data and data[-1] & 0xC0 == 0x80:
            data = data[:-1]
        data = data[:-1]
    return decoded(data, str(path))


def suffix(path: Path) -> str:
    """The name's end in small letters, .gz left out."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _unpacked(file: BinaryIO) -> io.BufferedReader:
    # BinaryIO is typing's name for what io calls RawIOBase; a file opened to read bytes is one
    reader = file if isinstance(file, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, file))
    if reader.peek(2)[:2] == _PACKED:
        return io.BufferedReader(gzip.GzipFile(fileobj=reader), _PIECE)
    return reader


def _text_lines(source: str, stream: io.BufferedReader) -> Iterator[tuple[str, str]]:
    """("file:line", its text), lines as a newline ends them: U+2028 and friends are legal inside a JSON string."""
    number = 0
    while line := stream.readline(ROW_LIMIT + 1):
        number += 1
        if len(line) > ROW_LIMIT:
            raise QtoolError(f"{source}:{number}: a line of more than {ROW_LIMIT // MB} MB.")
        _count(source, number)
        yield f"{source}:{number}", decoded(line, f"{source}:{number}")


def _lines(source: str, stream: io.BufferedReader) -> Iterator[Placed]:
    for where, line in _text_lines(source, stream):
        if line.strip():
            _check_parts(where, line)
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise QtoolError(f"{where}: not JSON ({error}). Each line must be one JSON object.") from error


def _items(source: str, stream: io.BufferedReader) -> Iterator[Placed]:
    """The items of one JSON list, of which no more than one is in memory."""
    window = _Window(source, stream)
    window.next()  # the bracket
    number = 0
    if window.next() == "]":
        return
    window.at -= 1
    while True:
        _count(source, number)
        where = f"{source}[{number}]"
        yield where, window.value(where)
        mark = window.next()
        if mark == "]":
            if window.next():
                raise QtoolError(f"{source}: not JSON (something follows the list).")
            return
        if mark != ",":
            raise QtoolError(f"{where}: not JSON ({f'{mark!r} follows it' if mark else 'the list has no end'}).")
        number += 1


class _Window:
    """The part of a JSON text that is in memory; ``at`` is where reading goes on."""

    def __init__(self, source: str, stream: io.BufferedReader) -> None:
        self._source, self._stream = source, stream
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self.at, self._whole = "", 0, False

    def next(self) -> str:
        """The next character that is no space, passed over; "" at the end."""
        while True:
            while self.at < len(self._text):
                self.at += 1
                if self._text[self.at - 1] not in " \t\r\n":
                    return self._text[self.at - 1]
            if self._whole:
                return ""
            self._read()

    def value(self, where: str) -> Any:
        """The JSON value that begins at ``at`` or behind spaces."""
        if self.next():
            self.at -= 1
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self.at)
            except (ValueError, RecursionError) as error:
                too_long = len(self._text) - self.at > ROW_LIMIT
                if self._whole or too_long or isinstance(error, RecursionError):
                    said = f"more than {ROW_LIMIT // MB} MB" if too_long else str(error)
                    raise QtoolError(f"{where}: not JSON ({said}).") from error
            else:
                if end < len(self._text) or self._whole:  # a number may go on
                    self.at = end
                    return value
            self._read()
            _check_parts(where, self._text)

    def _read(self) -> None:
        rest = self._text[self.at :]
        data = self._stream.read(max(_PIECE, len(rest)))  # twice as much each time: a long item is parsed again
        self._whole = not data
        try:
            self._text, self.at = rest + self._utf8.decode(data, final=self._whole), 0
        except UnicodeDecodeError as error:
            raise QtoolError(f"{self._source}: not UTF-8 ({error.reason}).") from error


def _csv(source: str, file: BinaryIO, delimiter: str) -> Iterator[Placed]:
    csv.field_size_limit(ROW_LIMIT)
    with _unpacked(file) as stream:
        lines = _text_lines(source, stream)
        reader = csv.DictReader((line for _, line in lines), delimiter=delimiter, restkey="", strict=True)
        try:
            for row in reader:
                where = f"{source}:{reader.line_num}"
                if "" in row:
                    raise QtoolError(f"{where}: a row with more cells than the header, or a column without a name.")
                yield where, row
        except csv.Error as error:
            raise QtoolError(f"{source}:{reader.line_num}: not CSV ({error}).") from error
        except _DAMAGED as error:
            raise _damaged(source, error) from error


def _parquet(path: Path) -> Iterator[Placed]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _count(str(path), file.metadata.num_rows)
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
            if max(sizes, default=0) > PARQUET_LIMIT:
                raise QtoolError(f"{path}: a row group of {max(sizes) // MB:,} MB; qtool reads {PARQUET_LIMIT // MB}.")
            number = 0
            for batch in file.iter_batches(batch_size=32):
                for row in batch.to_pylist():
                    yield f"{path}[{number}]", row
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # to_pylist: text that is not UTF-8
        said = " ".join(str(error).split())[:200]
        raise QtoolError(f"{path}: damaged parquet file ({said}). Download it again.") from error


def _damaged(source: str, error: Exception) -> QtoolError:
    if isinstance(error, OSError) and error.strerror:
        return QtoolError(f"{source}: {error.strerror}.", exit_code=3)
    return QtoolError(f"{source}: damaged gzip file ({error}). Download it again.")


def _count(source: str, rows: int) -> None:
    if rows > ROWS_LIMIT:
        raise QtoolError(f"{source}: more than {ROWS_LIMIT:,} rows. Name a part of it.")


def _check_parts(where: str, text: str) -> None:
    """JSON of nothing but brackets takes twenty times its size in memory."""
    if text.count("[") + text.count("{") + text.count(",") > PARTS_LIMIT:
        raise QtoolError(f"{where}: a row of more than {PARTS_LIMIT:,} values.")
