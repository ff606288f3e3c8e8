"""The numbers that a verdict rests on, what follows from them, and the sentences that say so: words are made here
alone, and nothing reads them back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal

from qtool.evaluate.statistics import Interval
from qtool.runs.summary import Loss, bounded_exp

Result = Literal["pass", "fail", "undecided"]
Measure = Literal["size", "bits saved", "KL", "loss", "recovery", "nll"]
LIMITS = {
    "size": "max_size", "bits saved": "min_bits_saved", "KL": "max_kld", "loss": "max_drop", "recovery": "min_recovery",
}  # fmt: skip
AT_LEAST = ("bits saved", "recovery")  # all else is to be at most its limit


@dataclass(frozen=True)
class Evidence:
    """One measurement beside its limit; None for what plays no part.

    ``value`` is the interval's estimate, in bytes, bits a weight, points of loss or a fraction (recovery). For KL and
    nll it is in nats a token: the mean, or the rise of the mean where two models are compared. ``before`` and
    ``after``: the value of each of the two models (rates as fractions, perplexities, bytes). ``n``: problems, windows,
    or blocks of a long text (``unit``).
    ``p`` is the test's own, ``p_holm`` is adjusted over ``comparisons``. A difference counts as shown where
    p_holm is below ``alpha``.
    """

    measure: Measure
    value: float
    limit: float | None = None
    interval: Interval | None = None
    before: float | None = None
    after: float | None = None
    n: int | None = None
    lost: int | None = None
    gained: int | None = None
    detectable: float | None = None
    p: float | None = None
    p_holm: float | None = None
    comparisons: int | None = None
    alpha: float | None = None
    unit: str = "windows"


def of_interval(measure: Measure, interval: Interval, limit: float, n: int | None = None) -> Evidence:
    """An estimate with its interval against a limit."""
    return Evidence(measure, interval.estimate, limit, interval, n=n)


def of_loss(loss: Loss, limit: float, measure: Literal["loss", "recovery"] = "loss") -> Evidence:
    """What was lost against the source, in points or as recovery."""
    found = loss.difference
    interval = found.loss if measure == "loss" or loss.recovery is None else loss.recovery
    return Evidence(
        measure, interval.estimate, limit, interval, n=found.problems, lost=found.lost, gained=found.gained,
        detectable=found.detectable, p=found.p, p_holm=loss.p_holm, comparisons=loss.comparisons,
    )  # fmt: skip


def result_of(evidence: Evidence) -> Result:
    """An exact value keeps its limit or not; an interval that includes the limit, or is no number, is undecided."""
    assert evidence.limit is not None
    sign = -1 if evidence.measure in AT_LEAST else 1
    limit, found = sign * evidence.limit, evidence.interval
    if found is None:
        return "pass" if sign * evidence.value <= limit else "fail"
    low, high = sorted((sign * found.low, sign * found.high))
    if math.isnan(low) or math.isnan(high):
        return "undecided"
    return "pass" if high < limit else "fail" if low > limit else "undecided"


def reason(evidence: Evidence) -> str:
    """Why a gate's result is what it is."""
    e, result, gate = evidence, result_of(evidence), LIMITS[evidence.measure]
    limit = e.limit or 0.0
    if e.measure == "size":
        compared = "at most" if result == "pass" else "above"
        said, most = size_text(e.value), size_text(limit)
        exact = f" ({e.value:,.0f} bytes)" if said == most and result == "fail" else ""
        return f"{said}{exact} is {compared} {gate} {most}"
    if e.measure == "bits saved":
        return f"{e.value:.2f} bpw saved is {'at least' if result == 'pass' else 'below'} {limit:g}"
    assert e.interval is not None
    low, high = e.interval.low, e.interval.high
    if e.measure == "loss":
        seen = f"{moved(e.interval)} on {e.n} problems"
    else:
        name = "mean KL" if e.measure == "KL" else e.measure
        seen = f"{name} {plain(e.value)} [{plain(low)}, {plain(high)}]"
    if math.isnan(low) or math.isnan(high):
        return f"{seen}: not a number"
    if result != "undecided":
        where = "within" if result == "pass" else "beyond"
        return f"{seen}: {where} {gate} {plain(limit)} ({100 * e.interval.confidence:g} % sure)"
    power = f"; {e.n} problems show losses from {e.detectable:.1f} points on" if e.detectable is not None else ""
    return f"{seen}: the interval includes {gate} {plain(limit)}{power if e.measure == 'loss' else ''}"


def side(evidence: Evidence, value: float | None) -> str:
    """One of two compared models' own number."""
    if value is None:
        return ""
    if evidence.measure == "size":
        return size_text(value)
    return f"{value:.1%}" if evidence.measure == "loss" else f"{value:.{3 if evidence.measure == 'nll' else 4}f}"


def change(evidence: Evidence) -> str:
    """What became of a measurement from one model to the other."""
    e = evidence
    if e.measure == "size":
        return f"{100 * ((e.after or 0) / (e.before or 1) - 1):+.1f} %"
    assert e.interval is not None
    if e.measure == "loss":
        said = f"{moved(e.interval)} on {e.n} problems ({e.lost} lost, {e.gained} gained)"
        return said + (f"; losses from {e.detectable:.1f} points on would show" if e.detectable is not None else "")
    low, high = e.interval.low, e.interval.high
    if e.measure == "nll":
        ratio = [f"{bounded_exp(x):.4f}" for x in (e.value, low, high)]
        return f"times {ratio[0]} [{ratio[1]}, {ratio[2]}]"
    return f"rose by {e.value:.4f} [{low:.4f}, {high:.4f}] nats a token on {e.n} {e.unit}"


def p_text(p: float, comparisons: int | None) -> str:
    """`p=0.12, Holm over 5`: an adjusted p never stands without its family."""
    return p_number(p) + (f", Holm over {comparisons}" if comparisons and comparisons > 1 else "")


def p_number(p: float) -> str:
    """`p=0.12`, `p<0.0001`."""
    return f"p={plain(p, 2)}" if p >= 1e-4 else "p<0.0001"


def plain(value: float, digits: int = 4) -> str:
    """So many significant digits, never an exponent: 0.0000052, 1180."""
    if not math.isfinite(value):
        return f"{value}"
    said = f"{Decimal(f'{value:.{digits}g}'):f}"
    return said.rstrip("0").rstrip(".") if "." in said else said


def moved(loss: Interval) -> str:
    """`lost 1.8 points [-1.1, 4.6]`; a gain in its own words, its interval turned: `gained 1.0 points [-2.0, 4.0]`."""
    if round(loss.estimate, 1) >= 0:
        return f"lost {points(loss)}".replace(" [", " points [")
    turned = Interval(-loss.estimate, -loss.high, -loss.low, loss.confidence)
    return f"gained {points(turned)}".replace(" [", " points [")


def points(loss: Interval) -> str:
    """`1.8 [-1.1, 4.6]`; never -0.0."""
    estimate, low, high = (round(x, 1) + 0.0 for x in (loss.estimate, loss.low, loss.high))
    return f"{estimate:.1f} [{low:.1f}, {high:.1f}]"


def size_text(nbytes: float) -> str:
    """MB or GB (1e6, 1e9 bytes)."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB"


def spent_text(seconds: float, stages: Mapping[str, float], peaks: Mapping[str, int]) -> str:
    """`129 s: opening 5.7, rounding 43.5; at most 1.3 GB resident`; stages under a twentieth of a second are left out,
    and so is what an older qtool did not note."""
    parts = ", ".join(f"{name} {spent:.1f}" for name, spent in stages.items() if spent >= 0.05)
    most = " and ".join(f"{size_text(nbytes)} {place}" for place, nbytes in peaks.items())
    return f"{seconds:.0f} s" + (f": {parts}" if parts else "") + (f"; at most {most}" if most else "")


def task_label(task: str) -> str:
    """A task's name; of a file, its name without the folder."""
    return Path(task).name
