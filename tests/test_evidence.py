"""Verdicts against their definition; the sentences that say them; numbers as programs read them."""

from __future__ import annotations

import math

import pytest

from qtool.evaluate.rates import rate_difference
from qtool.evaluate.statistics import Interval
from qtool.runs.evidence import Evidence, change, of_interval, of_loss, p_text, reason, result_of
from qtool.runs.summary import Loss


def loss_of(both: int, lost: int, gained: int, neither: int) -> Loss:
    source = [1] * both + [1] * lost + [0] * gained + [0] * neither
    quantized = [1] * both + [0] * lost + [1] * gained + [0] * neither
    return Loss(difference=rate_difference(source, quantized, 1), recovery=None, p_holm=0.5, comparisons=3)


@pytest.mark.parametrize(
    ("table", "d", "result"),
    [
        ((200, 2, 2, 196), 3.0, "pass"),
        ((100, 40, 2, 58), 3.0, "fail"),
        ((50, 5, 2, 25), 3.0, "undecided"),
        ((164, 0, 0, 0), 5.0, "pass"),
        ((0, 20, 0, 0), 99.0, "undecided"),
    ],
)
def test_max_drop(table: tuple[int, int, int, int], d: float, result: str) -> None:
    loss = loss_of(*table)
    found, interval = of_loss(loss, d), loss.difference.loss
    assert result_of(found) == result
    assert f"{sum(table)} problems" in reason(found)
    assert f"max_drop {d:g}" in reason(found)
    by_definition = "pass" if interval.high < d else "fail" if interval.low > d else "undecided"
    assert result_of(found) == by_definition
    assert (found.n, found.lost, found.gained, found.p_holm, found.comparisons) == (sum(table), *table[1:3], 0.5, 3)


@pytest.mark.parametrize(
    ("interval", "limit", "result"),
    [
        (Interval(0.05, 0.04, 0.06), 0.1, "pass"),
        (Interval(0.2, 0.15, 0.25), 0.1, "fail"),
        (Interval(0.1, 0.08, 0.12), 0.1, "undecided"),
        (Interval(0.1, -math.inf, math.inf), 0.2, "undecided"),
        (Interval(math.nan, math.nan, math.nan), 0.2, "undecided"),
        (Interval(0.1, 0.1, 0.1), 0.1, "undecided"),
    ],
)
def test_max_kld(interval: Interval, limit: float, result: str) -> None:
    assert result_of(of_interval("KL", interval, limit)) == result


@pytest.mark.parametrize(
    ("interval", "result", "words"),
    [
        (Interval(0.99, 0.97, 1.01), "pass", "within min_recovery 0.95 (95 % sure)"),
        (Interval(0.8, 0.7, 0.9), "fail", "beyond min_recovery 0.95 (95 % sure)"),
        (Interval(0.95, 0.9, 1.0), "undecided", "the interval includes min_recovery 0.95"),
    ],
)
def test_min_recovery(interval: Interval, result: str, words: str) -> None:
    found = of_interval("recovery", interval, 0.95)
    assert result_of(found) == result
    seen = f"recovery {interval.estimate:.4g} [{interval.low:.4g}, {interval.high:.4g}]"
    assert reason(found) == f"{seen}: {words}"


def test_max_size_is_exact() -> None:
    assert result_of(Evidence("size", 10**9, 10**9)) == "pass"
    assert result_of(Evidence("size", 10**9 + 1, 10**9)) == "fail"
    assert reason(Evidence("size", 2 * 10**9, 10**9)) == "2.00 GB is above max_size 1.00 GB"
    near = reason(Evidence("size", 10**9 + 1, 10**9))
    assert near == "1.00 GB (1,000,000,001 bytes) is above max_size 1.00 GB"


def test_bits_saved_are_exact() -> None:
    assert result_of(Evidence("bits saved", 11.5, 11.5)) == "pass"
    assert reason(Evidence("bits saved", 11.4, 11.5)) == "11.40 bpw saved is below 11.5"


def test_a_change_in_words() -> None:
    assert change(Evidence("size", 150, before=100, after=150)) == "+50.0 %"
    rise = Interval(0.01, -0.02, 0.03)
    assert change(Evidence("nll", 0.01, 0.01, rise)) == "times 1.0101 [0.9802, 1.0305]"
    assert change(Evidence("KL", 0.01, 0.1, rise, n=8)) == "rose by 0.0100 [-0.0200, 0.0300] nats a token on 8 windows"
    loss = Interval(-0.04, -1.0, 1.0)
    said = change(Evidence("loss", -0.04, interval=loss, n=40, lost=1, gained=2, detectable=9.5))
    assert said == "lost 0.0 points [-1.0, 1.0] on 40 problems (1 lost, 2 gained); losses from 9.5 points on would show"


def test_an_adjusted_p_never_stands_without_its_family() -> None:
    assert p_text(0.1234, 5) == "p=0.12, Holm over 5"
    assert p_text(0.1234, 1) == "p=0.12"
