"""Intervals and tests against scipy and published numbers."""

import math
import random
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from qtool.evaluate import statistics as regression
from qtool.evaluate.statistics import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    holm,
    mcnemar_exact,
    paired_difference,
    recovery,
    wilson,
)


def outcomes(both: int, lost: int, gained: int, neither: int) -> tuple[list[bool], list[bool]]:
    source = [True] * both + [True] * lost + [False] * gained + [False] * neither
    quantized = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return source, quantized


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 164), (164, 164), (61, 164), (1, 1000), (399, 400)])
def test_wilson_is_scipys(k: int, n: int, confidence: float) -> None:
    ours = wilson(k, n, confidence)
    theirs = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert ours.estimate == k / n
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 10).low == 0.0
    assert wilson(10, 10).high == 1.0
    for k, n in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="not a count"):
            wilson(k, n)
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, 1.0)


@pytest.mark.parametrize(("b", "c"), [(0, 1), (1, 0), (5, 5), (0, 6), (12, 3), (40, 41), (300, 200), (2000, 1000)])
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    assert mcnemar_exact(b, c) == pytest.approx(stats.binomtest(b, b + c).pvalue, rel=1e-9, abs=1e-300)


def test_mcnemar_without_pairs_shows_nothing() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    with pytest.raises(ValueError, match="not counts"):
        mcnemar_exact(-1, 2)


# Newcombe 1998, table III, method 10: [a, b, c, d], and the interval of (b - c) / n.
@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((0, 30, 0, 0), 0.8395, 1.0),
    ],
)
def test_newcombes_published_intervals(table: tuple[int, int, int, int], low: float, high: float) -> None:
    loss = paired_difference(*outcomes(*table)).loss
    assert (loss.low / 100, loss.high / 100) == pytest.approx((low, high), abs=6e-4)


def test_difference_counts_and_points() -> None:
    result = paired_difference(*outcomes(100, 12, 4, 84))
    assert (result.problems, result.lost, result.gained) == (200, 12, 4)
    assert result.loss.estimate == pytest.approx(4.0)
    assert result.p == pytest.approx(stats.binomtest(12, 16).pvalue)
    assert result.loss.low < 4.0 < result.loss.high


def test_difference_is_antisymmetric() -> None:
    source, quantized = outcomes(50, 9, 2, 39)
    one, other = paired_difference(source, quantized), paired_difference(quantized, source)
    assert one.loss.low == pytest.approx(-other.loss.high)
    assert one.loss.high == pytest.approx(-other.loss.low)
    assert one.p == other.p


def test_difference_without_discordance_is_not_certain() -> None:
    for result in (paired_difference(*outcomes(n, 0, 0, 0)) for n in (1, 20, 400)):
        assert result.loss.estimate == 0
        assert result.loss.low < 0 < result.loss.high
        assert result.p == 1.0
    narrow, wide = (paired_difference(*outcomes(n, 0, 0, n)).loss.high for n in (200, 20))
    assert narrow < wide


def test_difference_refuses_what_is_not_paired() -> None:
    with pytest.raises(ValueError, match="same problems"):
        paired_difference([True], [True, False])
    with pytest.raises(ValueError, match="no problems"):
        paired_difference([], [])


def test_interval_covers_at_its_level() -> None:
    generator = np.random.default_rng(0)
    # Shares of both, lost, gained, neither; the true loss is 4 points.
    shares, hits, rounds = (0.4, 0.07, 0.03, 0.5), 0, 1500
    for table in generator.multinomial(164, shares, size=rounds):
        loss = paired_difference(*outcomes(*table.tolist())).loss
        hits += loss.low <= 4.0 <= loss.high
    assert 0.935 <= hits / rounds <= 0.985


def test_detectable_loss_is_found_with_the_promised_power() -> None:
    seen = paired_difference(*outcomes(180, 20, 20, 180))
    assert seen.detectable is not None
    d, psi = seen.detectable / 100, 40 / 400
    generator = np.random.default_rng(0)
    shares = ((1 - psi) / 2, (psi + d) / 2, (psi - d) / 2, (1 - psi) / 2)
    tables = generator.multinomial(400, shares, size=800)
    shown = [paired_difference(*outcomes(*table.tolist())).loss.low > 0 for table in tables]
    assert 0.72 <= np.mean(shown) <= 0.88


def test_detectable_loss_shrinks_with_more_problems() -> None:
    values = [paired_difference(*outcomes(n, 0, 0, n)).detectable for n in (20, 82, 500)]
    assert all(value is not None for value in values)
    assert values == sorted(values, key=lambda value: -(value or 0))
    assert paired_difference([True], [True]).detectable is None


def test_bootstrap_mean_agrees_with_scipy_and_repeats() -> None:
    draws = np.random.default_rng(1).exponential(0.1, size=60)
    ours = bootstrap_mean(draws.tolist())
    theirs = stats.bootstrap((draws,), np.mean, method="percentile", rng=np.random.default_rng(2))
    assert ours.estimate == pytest.approx(draws.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=2e-3)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=2e-3)
    assert ours == bootstrap_mean(draws.tolist())
    assert bootstrap_mean([0.5] * 8) == Interval(0.5, 0.5, 0.5)


def test_bootstrap_of_one_value_knows_nothing() -> None:
    assert bootstrap_mean([0.3]) == Interval(0.3, -math.inf, math.inf)
    assert bootstrap_ratio([1.0], [2.0]) == Interval(0.5, -math.inf, math.inf)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_bootstrap_refuses_no_and_broken_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="value"):
        bootstrap_mean(values)


def test_bootstrap_ratio_is_paired() -> None:
    base = np.random.default_rng(3).exponential(1.0, size=50)
    exact = bootstrap_ratio((0.7 * base).tolist(), base.tolist())
    # The spread of the sequences cancels: an unpaired interval would be wide.
    assert (exact.low, exact.high) == pytest.approx((0.7, 0.7))
    noisy = bootstrap_ratio((0.7 * base + 0.1).tolist(), base.tolist())
    assert noisy.low < noisy.estimate < noisy.high


def test_bootstrap_ratio_without_a_denominator() -> None:
    with pytest.raises(ValueError, match="no ratio"):
        bootstrap_ratio([1.0, 2.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="not pairs"):
        bootstrap_ratio([1.0], [1.0, 2.0])
    assert bootstrap_ratio([1.0, 1.0, 1.0], [0.0, 0.0, 1.0]).high == math.inf


def test_bootstrap_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [random.Random(1).random() for _ in range(3000)]
    interval = bootstrap_mean(values, resamples=1000)
    half = stats.norm.ppf(0.975) * np.std(values) / math.sqrt(len(values))
    assert interval.high - interval.estimate == pytest.approx(half, rel=0.15, abs=1e-9)
    assert sum(len(rows) for rows in regression._resamples(3000, 1000)) == 1000


def test_recovery_is_the_losss_other_face() -> None:
    source = [True] * 40 + [False] * 10
    difference = paired_difference(source, [True] * 36 + [False] * 14)
    found = recovery(difference, 0.8)
    assert found.estimate == pytest.approx(0.9)
    assert found.low == pytest.approx(1 - difference.loss.high / 80)
    assert found.high == pytest.approx(1 - difference.loss.low / 80)
    with pytest.raises(ValueError, match="nothing to recover"):
        recovery(difference, 0.0)


def test_four_problems_that_did_not_change_are_no_certainty() -> None:
    """Resampling them would say 1 [1, 1]."""
    source = [True] * 4 + [False] * 69
    found = recovery(paired_difference(source, source), 4 / 73)
    assert found.estimate == 1
    assert found.low < 0.5
    assert found.high > 1.5
    assert found.low < 0.95 < found.high  # a gate of 0.95 is undecided


@pytest.mark.parametrize(("n", "rate", "lost", "gained"), [(73, 0.06, 0.3, 0.01), (164, 0.6, 0.08, 0.03)])
def test_recovery_covers(n: int, rate: float, lost: float, gained: float) -> None:
    """The interval holds the true ratio in at least 94 % of 400 drawn benchmarks (bootstrapped: 71 % at worst)."""
    generator = np.random.default_rng(0)
    true, hits, drawn = (rate * (1 - lost) + (1 - rate) * gained) / rate, 0, 0
    for _ in range(400):
        source = generator.random(n) < rate
        kept = np.where(source, generator.random(n) >= lost, generator.random(n) < gained)
        if source.any():
            found = recovery(paired_difference(source.tolist(), kept.tolist()), float(source.mean()))
            hits, drawn = hits + (found.low <= true <= found.high), drawn + 1
    assert hits / drawn >= 0.94


@pytest.mark.parametrize("ps", [[], [0.04], [0.01, 0.04, 0.03], [0.5, 0.5], [0.2, 0.001, 0.02, 0.02, 0.9, 0.013]])
def test_holm_is_the_closed_bonferroni_test(ps: list[float]) -> None:
    """Adjusted p of a hypothesis: the largest Bonferroni p of any family that holds it, all families enumerated."""
    families = [family for size in range(1, len(ps) + 1) for family in combinations(range(len(ps)), size)]
    expected = [
        max(min(1.0, len(family) * min(ps[j] for j in family)) for family in families if i in family)
        for i in range(len(ps))
    ]
    assert holm(ps) == pytest.approx(expected)
