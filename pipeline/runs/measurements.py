"""What was measured of a model: a line of the ledger, written by `qtool measure` and by a recipe's `measure:`, read by
report and card."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from qtool.runs import ledger

KIND = "measure"


@dataclass(frozen=True)
class Row:
    """Medians over repeats; percentiles over all requests of all repeats. ``status``: `ok`, `out of memory`, `too
    long`, `not run` or `rejected`, with ``why``. ``predicted``: bytes, None where the card is unknown; ``step_bound``
    and ``first_bound``: seconds."""

    context: int
    sequences: int
    status: str
    why: str = ""
    first_seconds: dict[str, float] | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    requests_per_second: float | None = None
    cost_per_million: float | None = None
    cached: float | None = None
    memory: dict[str, int | None] | None = None
    predicted: int | None = None
    step_bound: tuple[float, float | None] | None = None
    first_bound: tuple[float, float | None] | None = None


@dataclass(frozen=True)
class Measurement:
    """``key``: the artifact's, or the source's commit; None for a server, which does not say what it serves.
    ``version``: of the engine's packages; ``machine``: its card, or its processor. ``tokens`` were generated for each
    prompt. ``why``: nothing was measured, and the reason."""

    key: str | None
    model: str
    engine: str
    version: str
    machine: str
    tokens: int
    repeats: int
    time: str
    rows: tuple[Row, ...]
    why: str = ""

    @property
    def first(self) -> Row | None:
        """The first cell that was measured: what the score table shows."""
        return next((row for row in self.rows if row.status == "ok"), None)

    def as_json(self) -> dict[str, Any]:
        """As the ledger keeps it."""
        return {"kind": KIND} | asdict(self)

    def repeats_of(self, other: Measurement) -> bool:
        """Whether ``other`` was measured of the same model, in the same way, on the same kind of machine."""
        ours, theirs = (
            (m.key, m.engine, m.version, m.machine, m.tokens, m.repeats, [(r.context, r.sequences) for r in m.rows])
            for m in (self, other)
        )
        return ours == theirs


@cache
def _reader() -> TypeAdapter[Measurement]:
    return TypeAdapter(Measurement)  # where there is something to read: few runs are measured


def from_json(entry: Mapping[str, Any]) -> Measurement:
    """What `as_json` wrote. Raises ValueError for anything else."""
    return _reader().validate_python({key: value for key, value in entry.items() if key != "kind"})


def log(runs: Path, measurement: Measurement) -> None:
    """A line in the ledger."""
    ledger.append(runs, measurement.as_json())


def measured_models(runs: Path, keys: Mapping[str, str]) -> dict[str, list[Measurement]]:
    """Name -> what the ledger has of the model with its key, the newest first; of measurements that repeat one another
    the newest alone, and a failure only until something was measured. ``keys``: name -> key."""
    found: dict[str, list[Measurement]] = {}
    known: list[Measurement] = []
    for entry in reversed(ledger.read(runs)):
        if entry.get("kind") == KIND and entry.get("key") in keys.values():
            with suppress(ValueError):  # another version's
                known.append(from_json(entry))
    for name, key in keys.items():
        kept: list[Measurement] = []
        for measurement in (m for m in known if m.key == key):
            if not any(measurement.repeats_of(newer) for newer in kept):
                kept.append(measurement)
        if any(m.rows for m in kept):
            kept = [m for m in kept if m.rows]
        if kept:
            found[name] = kept
    return found


def one_machine(measured: Mapping[str, list[Measurement]]) -> dict[str, Measurement]:
    """For the score table, whose columns must compare: of each model the newest on one machine, the one that measured
    most of them; of several such the last."""
    every = {(name, m.machine): m.time for name, found in measured.items() for m in reversed(found) if m.rows}
    if not every:
        return {}
    machines = [machine for _, machine in every]
    last = {machine: max(time for (_, m), time in every.items() if m == machine) for machine in machines}
    machine = max(last, key=lambda machine: (machines.count(machine), last[machine]))
    chosen = {name: next((m for m in found if m.machine == machine), None) for name, found in measured.items()}
    return {name: measurement for name, measurement in chosen.items() if measurement is not None}


def less_device_memory(measurement: Measurement, taken: int) -> Measurement:
    """Without the ``taken`` bytes that another process held on the card all the while."""
    rows = []
    for row in measurement.rows:
        memory = dict(row.memory or {})
        if (device := memory.get("device")) is not None:
            memory["device"] = max(0, device - taken)
        rows.append(replace(row, memory=memory or None))
    return replace(measurement, rows=tuple(rows))
