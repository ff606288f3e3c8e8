"""Several samples a problem: the permutation test against full enumeration and scipy, intervals against scipy and their
coverage."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from qtool.evaluate.rates import mean_rate, permutation_p, rate_difference
from qtool.evaluate.statistics import mcnemar_exact, paired_difference, wilson


def by_enumeration(differences: list[int]) -> float:
    """Every one of the 2**n sign flips."""
    seen = abs(sum(differences))
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=len(differences))
    ]
    return sum(total >= seen for total in sums) / len(sums)


@pytest.mark.parametrize(
    "differences",
    [[3], [0, 0], [1, 1, 1], [5, -2, 0, 3, 3, -1], [4, 4, 4, -4], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [-7, 2, 2, 1, 0, 9]],
)
def test_permutation_is_the_enumeration(differences: list[int]) -> None:
    assert permutation_p(differences) == pytest.approx(by_enumeration(differences), rel=1e-12)
    assert permutation_p([-d for d in differences]) == pytest.approx(permutation_p(differences), rel=1e-12)


@pytest.mark.parametrize(("lost", "gained"), [(1, 0), (6, 0), (5, 5), (12, 3), (300, 200)])
def test_with_one_sample_it_is_mcnemars_test(lost: int, gained: int) -> None:
    assert permutation_p([1] * lost + [-1] * gained + [0] * 40) == pytest.approx(mcnemar_exact(lost, gained), rel=1e-9)


def test_permutation_is_scipys() -> None:
    differences = np.random.default_rng(4).integers(-4, 7, size=40)
    theirs = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(5)
    )
    assert permutation_p(differences.tolist()) == pytest.approx(theirs.pvalue, abs=0.01)


def test_thousands_of_samples_neither_overflow_nor_wrap() -> None:
    assert permutation_p([200] * 500 + [-200] * 500) == pytest.approx(1.0)
    assert 0 < permutation_p([10] * 900) < 1e-200


def test_one_sample_is_the_plain_score() -> None:
    source, quantized = [1, 1, 1, 0, 0, 1], [1, 0, 1, 1, 0, 0]
    assert mean_rate(source, 1) == wilson(4, 6)
    pairs = [bool(x) for x in source], [bool(x) for x in quantized]
    assert rate_difference(source, quantized, 1) == paired_difference(*pairs)


def test_difference_counts_and_points() -> None:
    found = rate_difference([5, 4, 0, 5], [5, 1, 1, 5], 5)
    assert (found.problems, found.lost, found.gained) == (4, 1, 1)
    assert found.loss.estimate == pytest.approx(100 * 2 / 5 / 4)
    assert found.p == pytest.approx(1.0)  # 3 - 1 against 3 + 1: every flip lies at least as far out
    assert found.loss.low < found.loss.estimate < found.loss.high


def test_interval_is_scipys_on_many_problems() -> None:
    generator = np.random.default_rng(6)
    source, quantized = generator.integers(0, 9, 400), generator.integers(0, 8, 400)
    found = rate_difference(source.tolist(), quantized.tolist(), 8).loss
    theirs = stats.bootstrap(((source - quantized) / 8,), np.mean, method="percentile", rng=np.random.default_rng(7))
    assert found.low == pytest.approx(100 * theirs.confidence_interval.low, abs=0.5)
    assert found.high == pytest.approx(100 * theirs.confidence_interval.high, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("problems", "samples", "moved"), [(30, 5, 0.3), (164, 10, 0.1), (100, 4, 0.02)])
def test_intervals_cover_at_their_level(problems: int, samples: int, moved: float) -> None:
    generator = np.random.default_rng(0)
    hits, right, rounds = 0, 0, 120
    for _ in range(rounds):
        ability = generator.beta(0.5, 0.5, problems)  # mean 0.5, most problems easy or hard
        other = np.where(generator.random(problems) < moved, generator.beta(0.4, 0.6, problems), ability)
        source, quantized = generator.binomial(samples, ability), generator.binomial(samples, other)
        loss = rate_difference(source.tolist(), quantized.tolist(), samples).loss
        hits += loss.low <= 100 * moved * 0.1 <= loss.high
        rate = mean_rate(source.tolist(), samples)
        right += rate.low <= 0.5 <= rate.high
    assert hits / rounds >= 0.92
    assert right / rounds >= 0.92


def test_no_difference_is_not_certain() -> None:
    found = rate_difference([5] * 20, [5] * 20, 5)
    assert (found.loss.estimate, found.p) == (0.0, 1.0)
    assert found.loss.low < -5
    assert found.loss.high > 5
    assert found.detectable is not None
    assert found.detectable > 10
    assert mean_rate([5] * 20, 5).low < 0.95
    assert rate_difference([5], [5], 5).detectable is None


@pytest.mark.parametrize(
    ("source", "quantized", "samples", "message"),
    [([3], [1], 2, "between 0 and"), ([1], [-1], 2, "between 0 and"), ([1, 2], [1], 2, "same problems"),
     ([], [], 2, "no problems"), ([0], [0], 0, "between 0 and")],
)  # fmt: skip
def test_impossible_counts_are_refused(source: list[int], quantized: list[int], samples: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rate_difference(source, quantized, samples)
