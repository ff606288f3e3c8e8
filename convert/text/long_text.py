"""One long text: the rows of a text, or the files of a folder, in their order and as one sequence of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.reading import named, open_file
from qtool.convert.text.bounded import ANSWER, SECONDS, Overrun, bounded
from qtool.convert.text.source import CODE, FILE_LIMIT, SHORTEST, TextSource
from qtool.convert.text.windows import LONGEST, pieces, read_rows, rendered, require_rows

APART = "\n\n"  # between files, and between rows
BYTES_A_TOKEN = 64  # more text than this for each token that is wanted is not read


@dataclass(frozen=True)
class LongText:
    """``tokens`` int64 ``[length]``; ``parts``: how many files or rows they are of."""

    tokens: torch.Tensor
    parts: int


def long_text(
    source: TextSource, tokenizer: Any, rows_of_model: int | None = None, askable: Callable[[int], int] = int
) -> LongText:
    """The first ``source.length`` tokens, behind a BOS token where the tokenizer starts texts with one. ``source.text``
    may be a folder. ``askable``: the longest length up to some tokens that may be asked for. Raises QtoolError where
    there are fewer (it says how many), the template refuses a row, or a token has no row in the model's embedding."""
    folder = named(source.text)
    rows = _files(folder, source.length) if folder.is_dir() else read_rows(source)
    texts = [(where, row if isinstance(row, str) else rendered(row, tokenizer)) for where, row in rows]
    for where, text in texts:
        if not isinstance(text, str) and text[1]:
            raise QtoolError(f"{where}: the model's chat template refuses this row: {text[1]}")
    plain = [text if isinstance(text, str) else text[0] for _, text in texts]
    start = tokenizer("x").input_ids[:1]
    ids = start if start == [tokenizer.bos_token_id] else []

    def work() -> Iterator[list[int]]:
        missing = source.length - len(ids)
        for text in plain:
            for piece in pieces(text + APART) if text.strip() else ():
                found = tokenizer(piece, add_special_tokens=False, verbose=False).input_ids[:missing]
                missing -= len(found)
                yield found
            yield []  # the end of a part
            if missing <= 0:
                return

    try:
        made = bounded(work, min(LONGEST, 2 * SECONDS + source.length / 5000), answer=ANSWER + 12 * source.length)
    except Overrun as error:
        raise QtoolError(f"long: {source.text!r}: the model's tokenizer {error.reason}.") from error
    ids = ids + [token for part in made for token in part]
    if len(ids) < source.length:
        shorter = f"Set `length: {askable(len(ids))}` or less, or name" if len(ids) >= SHORTEST else "Name"
        raise QtoolError(
            f"long: {source.text!r} has {len(ids):,} tokens of this model; {source.length:,} are asked for. {shorter} "
            "a longer text: a folder of code is taken whole."
        )
    tokens = torch.tensor(ids, dtype=torch.int64)
    if rows_of_model is not None:
        require_rows(int(tokens.max()), rows_of_model, tokenizer)
    return LongText(tokens, sum(not part for part in made))


def _files(folder: Path, length: int) -> Iterator[tuple[str, str]]:
    """("file", its name and text) of code and prose below a folder, in the order of their paths; hidden ones, links and
    what is no UTF-8 text are passed over. Raises QtoolError where there is none."""
    left, found = length * BYTES_A_TOKEN, False
    for path in _paths(folder):
        with open_file(path) as file:
            data = file.read(FILE_LIMIT + 1)
        if len(data) > FILE_LIMIT or b"\0" in data or not data.strip():
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        found = True
        left -= len(data)
        yield str(path), f"# File: {path.relative_to(folder).as_posix()}\n{text}"
        if left <= 0:
            return
    if not found:
        raise QtoolError(f"long: {folder}: holds no file of code or prose ({', '.join(CODE[:6])}, …).")


def _paths(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if not name.startswith(".") and path.suffix.lower() in CODE and path.is_file() and not path.is_symlink():
                yield path
