"""`qtool measure` from its arguments to the table and the ledger."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from qtool import QtoolError, ledger
from qtool.accelerators import Accelerator
from qtool.convert.source import SHIPPED, resolve
from qtool.formats import artifact_weights, weights_of
from qtool.headers import Headers, read_headers
from qtool.measure import Engine, Row, as_json, measure
from qtool.measure_engines import Server, Transformers, Vllm
from qtool.plan_report import console
from qtool.sizing import GIB, Cell, Setting, cell_of


@dataclass(frozen=True)
class Asked:
    """``model``: a folder, a shipped name, or a server's URL, whose ``shape`` is then told by a folder or config.json
    (None: nothing is predicted). ``name``: what the server calls its model."""

    model: str
    engine: str
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    tokens: int
    repeats: int
    device: str
    card: Accelerator | None
    price: float | None
    shape: str | None = None
    name: str = "default"
    api_key: str | None = None


def run(asked: Asked, runs: Path) -> list[Row]:
    """Measure, print as rows come, log. Raises QtoolError."""
    url = asked.model.startswith(("http://", "https://"))
    known = asked.shape if url else asked.model
    headers = read_headers(known) if known else None
    engine_name = "server" if url else asked.engine
    if headers is not None:
        _check_contexts(headers, asked)
    setting = _setting(headers, engine_name, asked.card) if headers else None

    def predict(context: int, sequences: int) -> Cell | None:
        return None if setting is None else cell_of(setting, context + asked.tokens, sequences)

    with _engine(asked, headers, url) as engine:
        rows = list(measure(engine, asked.contexts, asked.batches, asked.tokens, asked.repeats, predict, asked.price))
    entry = {
        "kind": "measure", "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": asked.model, "engine": engine_name, "card": asked.card.key if asked.card else None,
        "tokens": asked.tokens, "repeats": asked.repeats, "rows": as_json(rows),
    }  # fmt: skip
    ledger.append(runs, entry)
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    """Speeds, memory and cost, then every row that was not believed or not run, with why."""
    for cells in (_speeds, _costs):
        console.print(_table([_name(row) | cells(row) for row in rows]))
    for row in rows:
        if row.why:
            text = f"{row.context:,} x {row.sequences}: {row.status}: {row.why}"
            console.print(text, highlight=False, soft_wrap=True)


def _table(rows: Sequence[dict[str, str]]) -> Table:
    """Every column of the fullest row; what was not measured stays empty."""
    columns = list(dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    return table


def _name(row: Row) -> dict[str, str]:
    return {"prompt x batch": f"{row.context:,} x {row.sequences}", "status": row.status}


def _speeds(row: Row) -> dict[str, str]:
    cells: dict[str, str] = {}
    if row.first_seconds is not None:
        cells |= {f"first {name} s": f"{value:.3g}" for name, value in row.first_seconds.items()}
    if row.step_seconds is not None:
        cells["decode tok/s"] = f"{1 / row.step_seconds:.3g}"
        if row.step_bound is not None:
            cells["at most"] = f"{1 / row.step_bound[0]:.3g}"
    if row.tokens_per_second is not None and row.requests_per_second is not None:
        cells["all tok/s"] = f"{row.tokens_per_second:.3g}"
        cells["requests/s"] = f"{row.requests_per_second:.3g}"
    return cells


def _costs(row: Row) -> dict[str, str]:
    cells: dict[str, str] = {}
    for name, value in (row.memory or {}).items():
        if value is not None:
            cells[f"peak {name} GiB"] = f"{value / GIB:.2f}"
    if row.predicted is not None:
        cells["predicted GiB"] = f"{row.predicted / GIB:.2f}"
    if row.cached is not None:
        cells["prefix hits"] = f"{row.cached:.0%}"
    if row.cost_per_million is not None:
        cells["cost per million"] = f"{row.cost_per_million:.3g}"
    return cells


def _check_contexts(headers: Headers, asked: Asked) -> None:
    most = headers.geometry.max_context
    for context in asked.contexts:
        if most and context + asked.tokens > most:
            raise QtoolError(
                f"--context {context}: with {asked.tokens} generated tokens that is more than the {most:,} that "
                f"{headers.name} was made for (max_position_embeddings)."
            )


def _setting(headers: Headers, engine: str, card: Accelerator | None) -> Setting | None:
    if card is None:
        return None
    weights = artifact_weights(headers) if headers.quantized else weights_of(headers, "source")
    named = "vllm" if engine == "server" else engine
    kv_dtype = "f16" if named == "llama.cpp" else "bf16"
    return Setting(headers.geometry, weights, named, card, 1, kv_dtype)


@contextmanager
def _engine(asked: Asked, headers: Headers | None, url: bool) -> Iterator[Engine]:
    longest, most = max(asked.contexts) + asked.tokens, max(asked.batches)
    if url:
        vocabulary = headers.geometry.vocab if headers else 1000
        yield Server(asked.model, asked.name, vocabulary, asked.api_key)
        return
    assert headers is not None
    open_engine: dict[str, Callable[[], Engine]] = {
        "transformers": lambda: Transformers(_folder(asked.model), asked.device),
        "vllm": lambda: Vllm(_folder(asked.model), longest, most, headers.geometry.vocab),
    }
    if asked.engine in open_engine:
        if headers.gguf is not None:
            raise QtoolError(f"{asked.model}: holds a .gguf file; measure it with --engine llama.cpp.")
        yield open_engine[asked.engine]()
        return
    if headers.gguf is None:
        raise QtoolError(f"{asked.model}: holds no .gguf file; --engine llama.cpp needs one.")
    from qtool.evaluate import llama_cpp

    with llama_cpp.serve(headers.gguf, longest, most) as address:
        yield Server(address, headers.gguf.stem, headers.geometry.vocab, inside=True)


def _folder(model: str) -> Path:
    return resolve(model).path if model in SHIPPED else Path(model)
