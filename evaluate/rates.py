"""Scores with several samples a problem: pass@1 with its interval, and the paired loss by an exact permutation test.

With one sample a problem everything here is what `statistics` does. Sources: Fisher 1935 (sign-flip permutation of
paired differences); Agresti & Min 2005, Statistics in Medicine 24:729 (a pseudo-pair of each kind, without which an
interval on no differences is a point). Problems are resampled, not samples: problems are what generalizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from qtool.evaluate.statistics import Difference, Interval, bootstrap_mean, paired_difference, wilson


def permutation_p(differences: Sequence[int]) -> float:
    """Exact two-sided p of paired integer differences: the share of all 2**n sign flips whose sum lies as far from 0
    as the one seen. The distribution of the sum is built by convolution, so nothing is sampled; with differences of
    -1, 0 and 1 it is McNemar's exact test."""
    import numpy as np

    sizes = [abs(difference) for difference in differences if difference]
    reach, seen = sum(sizes), abs(sum(differences))
    chance = np.zeros(2 * reach + 1)
    chance[reach] = 1.0
    for size in sizes:  # the support never leaves the array: it ends at the sum of all sizes
        chance = 0.5 * (np.roll(chance, size) + np.roll(chance, -size))
    if seen == 0:
        return 1.0
    return float(min(1.0, chance[: reach - seen + 1].sum() + chance[reach + seen :].sum()))


def mean_rate(solved: Sequence[int], samples: int, confidence: float = 0.95) -> Interval:
    """pass@1 as a fraction: ``solved`` of ``samples`` answers were right, problem by problem. Wilson's interval for one
    sample; else a bootstrap over problems, one all right and one all wrong added. ValueError for impossible counts."""
    _check(solved, samples)
    if samples == 1:
        return wilson(sum(solved), len(solved), confidence)
    shares = [count / samples for count in solved]
    found = bootstrap_mean([*shares, 0.0, 1.0], confidence)
    return Interval(sum(shares) / len(shares), found.low, found.high, confidence)


def rate_difference(
    source: Sequence[int], quantized: Sequence[int], samples: int, confidence: float = 0.95
) -> Difference:
    """The loss on the same problems in the same order, ``samples`` answers each; ``lost`` and ``gained`` count problems
    whose share of right answers fell and rose. ValueError for unequal lengths, no problems, impossible counts."""
    _check(source, samples)
    _check(quantized, samples)
    if samples == 1:
        return paired_difference([bool(x) for x in source], [bool(x) for x in quantized], confidence)
    if len(source) != len(quantized):
        raise ValueError(f"{len(source)} and {len(quantized)} outcomes are not of the same problems")
    counts = [a - b for a, b in zip(source, quantized, strict=True)]
    smoothed = [*(count / samples for count in counts), 1.0, -1.0]
    found = bootstrap_mean(smoothed, confidence)
    mean = sum(counts) / samples / len(counts)
    loss = Interval(100 * mean, 100 * max(-1.0, found.low), 100 * min(1.0, found.high), confidence)
    lost, gained = sum(count > 0 for count in counts), sum(count < 0 for count in counts)
    return Difference(len(counts), loss, lost, gained, permutation_p(counts), _detectable(smoothed, confidence))


def _detectable(differences: Sequence[float], confidence: float, power: float = 0.8) -> float | None:
    """Points: the shift of the mean that the normal approximation shows with this power; None above 100."""
    import numpy as np

    normal = NormalDist()
    factor = normal.inv_cdf((1 + confidence) / 2) + normal.inv_cdf(power)
    points = 100 * factor * float(np.std(differences)) / math.sqrt(len(differences))
    return points if points < 100 else None


def _check(solved: Sequence[int], samples: int) -> None:
    if samples < 1 or any(not 0 <= count <= samples for count in solved):
        raise ValueError(f"counts of right answers must lie between 0 and the {samples} samples")
    if not solved:
        raise ValueError("no problems: nothing to compare")
