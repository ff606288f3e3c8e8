"""Did it get worse? Intervals and paired tests: pure functions of numbers.

Sources: Wilson 1927 (score interval); McNemar 1947, exact as a binomial test of the discordant pairs;
Newcombe 1998, Statistics in Medicine 17:2635 (interval for paired proportions, his method 10); Connor 1987,
Biometrics 43:207 (power of McNemar's test); Efron & Tibshirani 1993 (percentile bootstrap). Losses are in
points: 1 point is 1 % of the problems; positive means that the quantized model is worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

RESAMPLES = 10_000
SEED = 20_240_229
BLOCK = 2**21  # row indices that are in memory at a time, 16 MB


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided confidence interval, both in the estimate's own unit."""

    estimate: float
    low: float
    high: float
    confidence: float = 0.95


@dataclass(frozen=True)
class Difference:
    """Source against quantized model on the same problems.

    ``loss``: points lost (source minus quantized), with Newcombe's interval. ``lost`` and ``gained``:
    problems that only the source, only the quantized model solved. ``p``: exact two-sided McNemar.
    ``detectable``: the smallest loss in points that this many problems show with 80 % power at the interval's
    level, given the discordance seen; None where no loss could be shown.
    """

    problems: int
    loss: Interval
    lost: int
    gained: int
    p: float
    detectable: float | None


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for k successes in n trials, as fractions. ValueError for impossible counts."""
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is not a count of successes")
    z = _z(confidence)
    rate, spread = k / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n)) / (1 + spread)
    # Exactly 0 and 1 at the ends, where rounding would leave 1e-17.
    low = 0.0 if k == 0 else max(0.0, centre - half)
    high = 1.0 if k == n else min(1.0, centre + half)
    return Interval(rate, low, high, confidence)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p of b against c discordant pairs: a binomial test of b in b + c at 1/2."""
    if b < 0 or c < 0:
        raise ValueError(f"{b} and {c} are not counts")
    total, smaller = b + c, min(b, c)
    tail = sum(math.comb(total, i) for i in range(smaller + 1))
    # Integers until the end: no underflow for thousands of pairs.
    return float(min(1.0, 2 * tail / 2**total))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Scandinavian Journal of Statistics 6:65, 1979): with all of them below alpha the
    chance of one false alarm among them is at most alpha, however they depend. In the order given."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, largest = [1.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def paired_difference(source: Sequence[bool], quantized: Sequence[bool], confidence: float = 0.95) -> Difference:
    """The loss on the same problems in the same order. ValueError for unequal lengths or no problems."""
    n = len(source)
    if n != len(quantized):
        raise ValueError(f"{n} and {len(quantized)} outcomes are not of the same problems")
    if n == 0:
        raise ValueError("no problems: nothing to compare")
    pairs = [(bool(a), bool(b)) for a, b in zip(source, quantized, strict=True)]
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    both = pairs.count((True, True))
    low, high = _newcombe(both, lost, gained, n - both - lost - gained, confidence)
    loss = Interval(100 * (lost - gained) / n, 100 * low, 100 * high, confidence)
    detectable = detectable_loss(lost + gained, n, confidence)
    return Difference(n, loss, lost, gained, mcnemar_exact(lost, gained), detectable)


def bootstrap_mean(values: Sequence[float], confidence: float = 0.95, resamples: int = RESAMPLES) -> Interval:
    """Mean of independent values (one for each sequence) with its percentile bootstrap interval; fixed seed.

    One value alone has no spread to resample: its interval is infinite. ValueError for none, or a NaN.
    """
    import numpy as np  # not above: who reads stored intervals waits for nothing

    array = _finite(values)
    if len(array) == 1:
        return Interval(float(array[0]), -math.inf, math.inf, confidence)
    means = np.concatenate([array[rows].mean(axis=1) for rows in _resamples(len(array), resamples)])
    return _percentiles(float(array.mean()), means, confidence)


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """sum(numerators) / sum(denominators) with a PAIRED percentile bootstrap: both drawn by the same index.

    For mean KL of two artifacts on the same sequences. Resamples whose denominator is 0 count as infinite. ValueError
    for unequal lengths, none, NaN, or a denominator of 0.
    """
    import numpy as np

    top, bottom = _finite(numerators), _finite(denominators)
    if len(top) != len(bottom):
        raise ValueError(f"{len(top)} and {len(bottom)} values are not pairs")
    if bottom.sum() == 0:
        raise ValueError("the denominators add up to 0: no ratio")
    estimate = float(top.sum() / bottom.sum())
    if len(top) == 1:
        return Interval(estimate, -math.inf, math.inf, confidence)
    ratios = []
    for rows in _resamples(len(top), resamples):
        below = bottom[rows].sum(axis=1)
        infinite = np.full(len(rows), np.inf)
        ratios.append(np.divide(top[rows].sum(axis=1), below, out=infinite, where=below != 0))
    return _percentiles(estimate, np.concatenate(ratios), confidence)


def recovery(difference: Difference, source_rate: float) -> Interval:
    """Quantized score / source score, a fraction: 1 - loss / ``source_rate`` (a fraction above 0, taken as known).

    The interval is the paired loss's own, so that a loss and its recovery never tell two stories, and a few problems of
    which none changed are not taken for certainty, as resampling them would.
    """
    if not 0 < source_rate <= 1:
        raise ValueError(f"a source score of {source_rate} has nothing to recover")
    loss, whole = difference.loss, 100 * source_rate
    estimate, low, high = (1 - points / whole for points in (loss.estimate, loss.high, loss.low))
    return Interval(estimate, max(0.0, low), high, loss.confidence)


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence} is not between 0 and 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _newcombe(both: int, lost: int, gained: int, neither: int, confidence: float) -> tuple[float, float]:
    """Newcombe's method 10: two Wilson intervals joined by the (corrected) correlation of the pairs.

    It keeps its coverage for the few discordant pairs that quantization leaves, where the bootstrap and
    Wald's interval collapse to a point.
    """
    n = both + lost + gained + neither
    first, second = wilson(both + lost, n, confidence), wilson(both + gained, n, confidence)
    margins = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    product = float(both * neither - lost * gained)
    if product > 0:
        product = max(product - n / 2, 0.0)
    phi = product / math.sqrt(margins) if margins else 0.0
    theta = first.estimate - second.estimate
    down_1, up_1 = first.estimate - first.low, first.high - first.estimate
    down_2, up_2 = second.estimate - second.low, second.high - second.estimate
    delta = math.sqrt(max(0.0, down_1**2 - 2 * phi * down_1 * up_2 + up_2**2))
    epsilon = math.sqrt(max(0.0, up_1**2 - 2 * phi * up_1 * down_2 + down_2**2))
    return max(-1.0, theta - delta), min(1.0, theta + epsilon)


def detectable_loss(discordant: int, n: int, confidence: float, power: float = 0.8) -> float | None:
    """Points. Connor's difference d solves n d^2 = (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2.

    psi, the share of discordant pairs, is the one seen, but at least what makes any loss detectable at all:
    a larger loss brings discordant pairs of its own.
    """
    z_alpha, z_beta = _z(confidence), NormalDist().inv_cdf(power)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        psi = max(discordant / n, middle)
        if math.sqrt(n) * middle < z_alpha * math.sqrt(psi) + z_beta * math.sqrt(psi - middle * middle):
            low = middle
        else:
            high = middle
    return 100 * high if high < 1.0 else None


def problems_needed(points: float, discordance: float, confidence: float = 0.95, power: float = 0.8) -> int:
    """How many problems show a loss of ``points`` where this share of outcomes changes (at least the loss itself):
    Connor's formula, solved for n. ValueError for what is no loss or no share."""
    loss = points / 100
    if not 0 < loss <= 1 or not 0 <= discordance <= 1:
        raise ValueError(f"a loss of {points} points with {discordance} of the outcomes changed cannot be")
    psi = max(discordance, loss)
    z_alpha, z_beta = _z(confidence), NormalDist().inv_cdf(power)
    return math.ceil(((z_alpha * math.sqrt(psi) + z_beta * math.sqrt(psi - loss * loss)) / loss) ** 2)


def _finite(values: Sequence[float]) -> npt.NDArray[np.float64]:
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError("no values")
    if not np.isfinite(array).all():
        raise ValueError("a value is NaN or infinite")
    return array


def _resamples(n: int, count: int) -> Iterable[npt.NDArray[np.int64]]:
    """Row indices [draws, n] in blocks of bounded memory; the same for every call with the same n."""
    return _few(n, count) if n * count <= BLOCK else _drawn(n, count)


@lru_cache(maxsize=1)  # the intervals of one text are all over its windows
def _few(n: int, count: int) -> list[npt.NDArray[np.int64]]:
    return list(_drawn(n, count))


def _drawn(n: int, count: int) -> Iterator[npt.NDArray[np.int64]]:
    import numpy as np

    generator = np.random.default_rng(SEED)
    block = max(1, min(count, BLOCK // n))
    sizes = [block] * (count // block) + ([count % block] if count % block else [])
    return (generator.integers(0, n, size=(size, n)) for size in sizes)


def _percentiles(estimate: float, draws: npt.NDArray[np.float64], confidence: float) -> Interval:
    import numpy as np

    _z(confidence)
    tail = (1 - confidence) / 2
    # "inverted_cdf" never interpolates, so that infinite draws stay infinite and do not become NaN.
    low, high = np.quantile(draws, [tail, 1 - tail], method="inverted_cdf")
    return Interval(estimate, float(low), float(high), confidence)
