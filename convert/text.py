"""Text for calibration and evaluation: where it is, how it is read, how it becomes equal windows of tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from qtool import QtoolError

SHIPPED = {
    "qtool-code": ("qtool.quantize", "data/calibration.jsonl"),
    "heldout-code": ("qtool.evaluate", "data/heldout_code.jsonl"),
}
Row = str | list[dict[str, str]]  # plain text, or chat messages


class TextSource(BaseModel):
    """``text``: a name in SHIPPED, a .txt/.jsonl/.parquet file, or a Hub data set with its ``split`` and
    ``revision``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    split: str = "train"
    revision: str | None = None
    column: str | None = None
    samples: Annotated[int, Field(gt=0)] = 128
    length: Annotated[int, Field(ge=8)] = 512
    seed: int = 0


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The model's own tokenizer. Raises QtoolError when the folder carries none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError) as error:
        raise QtoolError(f"{path}: no usable tokenizer ({str(error).partition(chr(10))[0]}).") from error


def token_windows(source: TextSource, tokenizer: Any) -> torch.Tensor:
    """int64 ``[samples, length]``: rows shuffled by seed, joined by the end-of-text token, cut into equal windows.

    A tokenizer that starts texts with a BOS token gets one at the start of every window, as the model saw in training.
    Raises QtoolError when the text is empty or too short.
    """
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    start = tokenizer("x").input_ids[:1]
    bos = start if start == [tokenizer.bos_token_id] else []
    body = source.length - len(bos)
    rows = list(read_rows(source))
    random.Random(source.seed).shuffle(rows)
    windows: list[list[int]] = []
    buffer: list[int] = []
    for row in rows:
        text = row if isinstance(row, str) else _render(row, tokenizer)
        # rows are longer than a model's window on purpose: they are cut below
        buffer += tokenizer(text, add_special_tokens=False, verbose=False).input_ids + eos
        while len(buffer) >= body and len(windows) < source.samples:
            windows.append(bos + buffer[:body])
            del buffer[:body]
        if len(windows) == source.samples:
            return torch.tensor(windows, dtype=torch.int64)
    if not rows:
        raise QtoolError(f"text {source.text!r}: no rows.")
    lower = f"`samples` to {len(windows)} or less" if windows else "`length`"
    raise QtoolError(
        f"text {source.text!r}: fills {len(windows)} windows of {source.length} tokens; {source.samples} are asked for."
        f" Lower {lower}, or name a longer text."
    )


def read_rows(source: TextSource) -> Iterator[Row]:
    """Rows of the source, as they come. Raises QtoolError (exit 2: unreadable; exit 3: needs a network it lacks)."""
    if source.text in SHIPPED:
        package, name = SHIPPED[source.text]
        yield from _jsonl(files(package).joinpath(name).read_text(encoding="utf-8"), source, source.text)
        return
    path = Path(source.text).expanduser()
    if path.suffix in {".txt", ".jsonl", ".parquet"}:
        if not path.exists():
            raise QtoolError(f"text: no file {path}.")
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
        elif path.suffix == ".jsonl":
            yield from _jsonl(path.read_text(encoding="utf-8"), source, str(path))
        else:
            yield from _dataset("parquet", source, data_files=str(path))
        return
    yield from _dataset(source.text, source, revision=source.revision)


def _jsonl(text: str, source: TextSource, origin: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() also ends lines that JSON does not
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise QtoolError(f"{origin}:{number}: not JSON ({error}).") from error
            yield _row(record, source.column, f"{origin}:{number}")


def _dataset(name: str, source: TextSource, **options: Any) -> Iterator[Row]:
    from datasets import load_dataset

    split = "train" if name == "parquet" else source.split
    try:
        rows = load_dataset(name, split=split, streaming=True, **options)
        for number, record in enumerate(rows):
            yield _row(record, source.column, f"{name}[{number}]")
            if number > 50 * source.samples:  # enough text for any tokenizer; the rest is not downloaded
                return
    except (OSError, ValueError) as error:
        raise QtoolError(
            f"text: the data set {name!r} (split {split!r}) cannot be fetched ({type(error).__name__}). Offline, save "
            'rows as {"text": …} lines in a .jsonl file and name that file.',
            exit_code=3,
        ) from error


def _row(record: Any, column: str | None, origin: str) -> Row:
    keys: tuple[str, ...] = (column,) if column else ("text", "content", "messages", "conversations")
    if isinstance(record, dict):
        for key in keys:
            value = record.get(key)
            if isinstance(value, str):
                return value
            if isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value):
                return value
    raise QtoolError(f"{origin}: no {' / '.join(map(repr, keys))} holding text or messages. Set `column:`.")


def _render(messages: list[dict[str, str]], tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(message["content"] for message in messages)
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return rendered
