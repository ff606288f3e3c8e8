"""`qtool measure`: what an engine really needs and does, beside what was predicted and what no machine can beat."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qtool.runs.measurements import Row
from qtool.sizing.bounds import Range
from qtool.sizing.fit import Cell

TOLERANCE = 0.98  # of a bound: clocks are read to a few microseconds


class OutOfMemory(Exception):
    """The engine could not hold so much."""


@dataclass(frozen=True)
class Reading:
    """One repeat. ``first``: seconds to the first token, for each request; ``steps``: mean seconds of each request's
    further tokens; ``wall``: seconds until all were done; ``tokens``: generated in all; ``cached``: share of the
    prompts that the engine took from its prefix cache, None where it does not say; ``memory``: peaks in bytes."""

    first: tuple[float, ...]
    steps: tuple[float, ...]
    wall: float
    tokens: int
    cached: float | None
    memory: dict[str, int | None]


class Engine(Protocol):
    """What measures: one batch of ``sequences`` prompts of ``context`` tokens, each answered with ``tokens``."""

    def run(self, context: int, sequences: int, tokens: int) -> Reading:
        """Raises OutOfMemory."""


def measure(
    engine: Engine, contexts: Sequence[int], batches: Sequence[int], tokens: int, repeats: int,
    predict: Callable[[int, int], Cell | None], price: float | None = None,
) -> Iterator[Row]:  # fmt: skip
    """A row for each cell as it is done. A context's further batches are not run once one ran out of memory.

    ``price``: of an hour of the machine, in any currency; ``predict(context, sequences)``: what `qtool plan` says.
    """
    for context in contexts:
        stopped = False
        for sequences in sorted(batches):
            cell = predict(context, sequences)
            if stopped:
                yield Row(context, sequences, "not run", "a smaller batch ran out of memory", predicted=_total(cell))
                continue
            try:
                engine.run(context, sequences, min(tokens, 4))  # warm-up: kernels compiled, caches filled
                readings = [engine.run(context, sequences, tokens) for _ in range(repeats)]
            except OutOfMemory as error:
                stopped = True
                yield Row(context, sequences, "out of memory", str(error), predicted=_total(cell))
                continue
            yield judge(context, sequences, tokens, readings, cell, price)


def judge(
    context: int, sequences: int, tokens: int, readings: Sequence[Reading], cell: Cell | None, price: float | None
) -> Row:
    """The readings of a cell as a row; one that beats its bound is rejected."""
    first = sorted(seconds for reading in readings for seconds in reading.first)
    steps = [seconds for reading in readings for seconds in reading.steps]
    step = statistics.median(steps) if steps else None
    rate = statistics.median(reading.tokens / reading.wall for reading in readings)
    cached = [reading.cached for reading in readings if reading.cached is not None]
    hit = statistics.median(cached) if cached else None
    wrong = []
    if cell is not None and step is not None and step < TOLERANCE * cell.step.best:
        wrong.append(f"{1e3 * step:.3g} ms a token beats the bound of {1e3 * cell.step.best:.3g} ms")
    fresh = 1 - (hit or 0)  # what the prefix cache served was not computed
    if cell is not None and cell.first_token is not None and first:
        least = cell.first_token.best * fresh / sequences  # the first of several prompts may be served alone
        if first[0] < TOLERANCE * least:
            wrong.append(f"first token after {first[0]:.3g} s beats the bound of {least:.3g} s")
    return Row(
        context, sequences, "rejected" if wrong else "ok", "; ".join(wrong),
        {name: percentile(first, share) for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))},
        step, rate, rate / tokens, price / 3600 / rate * 1e6 if price is not None else None, hit, _peak(readings),
        _total(cell), _ends(cell.step) if cell else None,
        _ends(cell.first_token) if cell and cell.first_token else None,
    )  # fmt: skip


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of the sorted values do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _peak(readings: Sequence[Reading]) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for name in readings[0].memory:
        values = [value for reading in readings if (value := reading.memory[name]) is not None]
        found[name] = max(values) if values else None
    return found


def _total(cell: Cell | None) -> int | None:
    return None if cell is None else cell.total


def _ends(found: Range) -> tuple[float, float | None]:
    return found.best, found.slow
