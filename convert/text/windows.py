"""Text for calibration and evaluation: where it is, how it is read, how it becomes equal windows of tokens."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.reading import MB, TEXT_LIMIT, named, open_file, shown
from qtool.convert.text.bounded import ANSWER, SECONDS, Overrun, bounded
from qtool.convert.text.records import Placed, parse_records, read_beginning, read_records, suffix
from qtool.convert.text.shapes import Row, has_text, row_of, said
from qtool.convert.text.source import TextSource
from qtool.convert.text.templates import render_one
from qtool.convert.text.tokenizer import (
    load_tokenizer as load_tokenizer,  # where everything that makes windows is found
)

SHIPPED = {
    "qtool-code": ("qtool.quantize", "data/calibration.jsonl"),
    "heldout-code": ("qtool.evaluate", "data/heldout_code.jsonl"),
}
ROWS = frozenset({".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"})
SHOWN_FORMATS = "text of any kind (.txt, .md, .py, …), or rows (.jsonl, .json, .csv, .parquet), also as .gz"
PIECE = 2**20  # characters of one text that are encoded at a time
BEGINNING = 256 * MB  # of a file of plain text: far more than any windows need
LONGEST = 3600.0


def token_windows(source: TextSource, tokenizer: Any, rows_of_model: int | None = None) -> torch.Tensor:
    """int64 ``[samples, length]``: rows shuffled by seed, joined by the end-of-text token, cut into equal windows.

    A tokenizer that starts texts with a BOS token gets one at the start of every window, as the model saw in training.
    Rows without text do not count. ``rows_of_model``: rows of the model's embedding. Raises QtoolError where the text
    is empty or too short, a row is refused by the chat template, or a token has no row in the model.
    """
    rows = _shuffled(source)
    seconds = min(LONGEST, 2 * SECONDS + source.samples * source.length / 5000)

    def work() -> Iterator[Any]:
        yield from _windows(source, tokenizer, rows)

    try:
        made = bounded(work, seconds, answer=ANSWER + 12 * source.samples * source.length)
    except Overrun as error:
        raise QtoolError(f"text {source.text!r}: the model's tokenizer {error.reason}.") from error
    if made and isinstance(made[-1], str):
        raise QtoolError(made[-1])
    if len(made) < source.samples:
        lower = f"`samples` to {len(made)} or less" if made else "`length`"
        raise QtoolError(
            f"text {source.text!r}: fills {len(made)} windows of {source.length} tokens; {source.samples} are asked "
            f"for. Lower {lower}, or name a longer text."
        )
    windows = torch.tensor(made, dtype=torch.int64)
    if rows_of_model is not None:
        require_rows(int(windows.max()), rows_of_model, tokenizer)
    return windows


def require_rows(token: int, rows: int, tokenizer: Any) -> None:
    """Raises QtoolError where a token's id has no row in the model's embedding."""
    if token >= rows:
        text = shown(str(tokenizer.convert_ids_to_tokens(token)))
        raise QtoolError(
            f"{tokenizer.name_or_path or 'the model'}: the tokenizer gives token {token} ({text!r}), but the model's "
            f"embedding has {rows} rows: tokenizer and weights are not of one model. Copy the tokenizer's files from "
            "the model's own repository."
        )


def _shuffled(source: TextSource) -> list[tuple[str, Row]]:
    rows = []
    empty = size = 0
    for where, row in read_rows(source):
        if not has_text(row):
            empty += 1
            continue
        rows.append((where, row))
        size += len(row) if isinstance(row, str) else sum(len(message["content"]) for message in row)
        if size > TEXT_LIMIT:
            raise QtoolError(f"text {source.text!r}: more than {TEXT_LIMIT / MB:,.0f} MB of text. Name a part of it.")
    if not rows:
        seen = f"{empty} rows, none of them with text in it" if empty else "no rows"
        raise QtoolError(f"text {source.text!r}: {seen}.")
    random.Random(source.seed).shuffle(rows)
    return rows


def _windows(source: TextSource, tokenizer: Any, rows: list[tuple[str, Row]]) -> Iterator[list[int] | str]:
    """Windows of tokens, or as the last value why there are no more."""
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    start = tokenizer("x").input_ids[:1]
    bos = start if start == [tokenizer.bos_token_id] else []
    body = source.length - len(bos)
    buffer: list[int] = []
    made = 0
    for where, row in rows:
        text = row if isinstance(row, str) else None
        if not isinstance(row, str):
            text, refusal = rendered(row, tokenizer)
            if refusal:
                yield f"{where}: the model's chat template refuses this row: {refusal}"
                return
        tokens = 0
        for piece in pieces(text or ""):
            # rows are longer than a model's window on purpose: they are cut below
            ids = tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
            tokens += len(ids)
            buffer += ids
            while len(buffer) >= body:
                yield bos + buffer[:body]
                del buffer[:body]
                made += 1
                if made == source.samples:
                    return
        if tokens:  # a text of which the tokenizer leaves nothing would only add the mark of its end
            buffer += eos


def rendered(messages: list[dict[str, Any]], tokenizer: Any) -> tuple[str, str]:
    """(the text of a conversation, why the model's template refuses it)."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(text for message in messages if (text := said(message))), ""
    made = render_one(tokenizer, messages)
    return made.text, made.refusal


def pieces(text: str) -> Iterator[str]:
    """A long text in parts that end at a line's end where there is one."""
    at = 0
    while len(text) - at > PIECE:
        end = text.rfind("\n", at, at + PIECE) + 1
        end = end if end > at else at + PIECE
        yield text[at:end]
        at = end
    yield text[at:]


def read_rows(source: TextSource) -> Iterator[tuple[str, Row]]:
    """(place, row) of the source, as they come. Raises QtoolError (exit 2: unreadable; exit 3: needs a network it
    lacks)."""
    if source.text in SHIPPED:
        package, name = SHIPPED[source.text]
        data = files(package).joinpath(name).read_bytes()
        yield from _rows(parse_records(source.text, io.BytesIO(data)), source)
        return
    path = named(source.text)
    if path.is_dir():
        raise QtoolError(f"text {source.text!r}: is a folder. Name one file: {SHOWN_FORMATS}.")
    if not path.exists():
        if not _is_data_set(source.text, path):
            raise QtoolError(f"text: no file {shown(path)}. Name a file that is there: {SHOWN_FORMATS}.")
        yield from _data_set(source)
    elif suffix(path) in ROWS:
        open_file(path, TEXT_LIMIT).close()
        yield from _rows(read_records(path), source)
    else:
        yield str(path), read_beginning(path, BEGINNING)


def _rows(records: Iterator[Placed], source: TextSource) -> Iterator[tuple[str, Row]]:
    for where, record in records:
        yield where, row_of(record, source.column, where)


def _is_data_set(text: str, path: Path) -> bool:
    """Whether a name without a file may be a data set of the Hub: name or org/name, no file's suffix, no path."""
    return text.count("/") <= 1 and not text.startswith((".", "~", "/")) and suffix(path) not in {*ROWS, ".txt", ".md"}


def _data_set(source: TextSource) -> Iterator[tuple[str, Row]]:
    from datasets import load_dataset

    name = source.text
    try:
        rows = load_dataset(name, split=source.split, streaming=True, revision=source.revision)
        for number, record in enumerate(rows):
            where = f"{name}[{number}]"
            yield where, row_of(record, source.column, where)
            if number > 50 * source.samples:  # enough text for any tokenizer; the rest is not downloaded
                return
    except (OSError, ValueError) as error:
        raise QtoolError(
            f"text: there is no file {name!r}, and the data set {name!r} (split {source.split!r}) cannot be fetched "
            f"({type(error).__name__}). Offline, save rows as "
            '{"text": …} lines in a .jsonl file and name that file.',
            exit_code=3,
        ) from error
