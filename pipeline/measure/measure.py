"""`qtool measure`: what an engine really needs and does, beside what was predicted and what no machine can beat."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence

from qtool.evaluate.engines.engine import Batch, OutOfMemory, Reading
from qtool.runs.measurements import Row
from qtool.sizing.bounds import Range
from qtool.sizing.fit import Estimate

TOLERANCE = 0.98  # of a bound: clocks are read to a few microseconds
LEAST_ID = 10  # ids below are special tokens in most vocabularies


def measure(
    time: Callable[[Batch], Reading], contexts: Sequence[int], batches: Sequence[int], tokens: int, repeats: int,
    predict: Callable[[int, int], Estimate | None], vocabulary: int, price: float | None = None,
) -> Iterator[Row]:  # fmt: skip
    """A row for each context and batch as it is done. A context's further batches are not run once one ran out of
    memory. Prompts are random ids of ``vocabulary``, so that no prefix cache helps.

    ``time``: a running model's; ``price``: of an hour of the machine, in any currency; ``predict(context, sequences)``:
    what `qtool plan` says.
    """
    source = random.Random(0)

    def put(context: int, sequences: int, tokens: int) -> Reading:
        return time(Batch(tuple(random_prompt(source, context, vocabulary) for _ in range(sequences)), tokens))

    for context in contexts:
        stopped = ""
        for sequences in sorted(batches):
            predicted = predict(context, sequences)
            if stopped:
                why = f"a smaller batch: {stopped}"
                yield Row(context, sequences, "not run", why, predicted=_total(predicted))
                continue
            try:
                put(context, sequences, min(tokens, 4))  # warm-up: kernels compiled, caches filled
                readings = [put(context, sequences, tokens) for _ in range(repeats)]
            except OutOfMemory as error:
                stopped = error.status
                yield Row(context, sequences, error.status, str(error), predicted=_total(predicted))
                continue
            yield judge(context, sequences, tokens, readings, predicted, price)


def random_prompt(source: random.Random, length: int, vocabulary: int) -> tuple[int, ...]:
    """Random token ids."""
    return tuple(source.randrange(min(LEAST_ID, vocabulary - 1), vocabulary) for _ in range(length))


def judge(
    context: int,
    sequences: int,
    tokens: int,
    readings: Sequence[Reading],
    predicted: Estimate | None,
    price: float | None,
) -> Row:
    """The readings of a context and batch as a row; one that beats its bound is rejected."""
    first = sorted(seconds for reading in readings for seconds in reading.first)
    steps = [seconds for reading in readings for seconds in reading.steps]
    step = statistics.median(steps) if steps else None
    rate = statistics.median(reading.tokens / reading.wall for reading in readings)
    cached = [reading.cached for reading in readings if reading.cached is not None]
    hit = statistics.median(cached) if cached else None
    wrong = []
    if predicted is not None and step is not None and step < TOLERANCE * predicted.step.best:
        wrong.append(f"{1e3 * step:.3g} ms a token beats the bound of {1e3 * predicted.step.best:.3g} ms")
    fresh = 1 - (hit or 0)  # what the prefix cache served was not computed
    if predicted is not None and predicted.first_token is not None and first:
        least = predicted.first_token.best * fresh / sequences  # the first of several prompts may be served alone
        if first[0] < TOLERANCE * least:
            wrong.append(f"first token after {first[0]:.3g} s beats the bound of {least:.3g} s")
    return Row(
        context, sequences, "rejected" if wrong else "ok", "; ".join(wrong),
        {name: percentile(first, share) for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))},
        step, rate, rate / tokens, price / 3600 / rate * 1e6 if price is not None else None, hit, _peak(readings),
        _total(predicted), _ends(predicted.step) if predicted else None,
        _ends(predicted.first_token) if predicted and predicted.first_token else None,
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


def _total(predicted: Estimate | None) -> int | None:
    return None if predicted is None else predicted.total


def _ends(found: Range) -> tuple[float, float | None]:
    return found.best, found.slow
