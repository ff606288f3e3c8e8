"""From answered requests to a level: percentiles with failures in them, goodput, and what the plan says beside."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from qtool.measure.load import Answered
from qtool.measure.measure import TOLERANCE, percentile
from qtool.observe.window import SHARES, Observation
from qtool.runs.loads import Level, Slo
from qtool.sizing.fit import Estimate

MOST_FAULTS = 5  # different ones that a level names


def level_of(
    answered: Sequence[Answered], users: int | None, rate: float | None, slo: Slo, prompt: int,
    seen: Observation | None = None, predicted: Estimate | None = None, alone: Estimate | None = None,
) -> Level:  # fmt: skip
    """``seen``: the server's own metrics of the time; ``predicted``: the plan at this many requests at once, ``alone``:
    of a single one, which no request can beat."""
    failed = [one for one in answered if one.fault]
    wall = max(one.ended for one in answered)
    first = [math.inf if one.first_seconds is None else one.first_seconds for one in answered]
    steps = [math.inf if one.fault else one.step_seconds for one in answered]
    whole = [math.inf if one.fault else one.ended - one.planned for one in answered]
    known_steps = [step for step in steps if step is not None]
    good = sum(_kept(one, slo) for one in answered)
    made = sum(one.tokens for one in answered if not one.fault)
    cached = [one.cached for one in answered if one.cached is not None]
    of_first, of_step = _quantiles(first), _quantiles(known_steps)
    return Level(
        users=users, rate=rate, requests=len(answered), failed=len(failed), faults=_faults(failed), wall=wall,
        first=of_first, step=of_step, whole=_quantiles(whole), tokens_per_second=made / wall,
        requests_per_second=(len(answered) - len(failed)) / wall, good=good / wall,
        keeps=None if slo == Slo() else _within(of_first, slo.first) and _within(of_step, slo.step),
        in_flight=sum(one.ended - one.planned for one in answered) / wall,
        late=percentile(sorted(one.sent - one.planned for one in answered), 0.95),
        cached=sum(cached) / (prompt * len(cached)) if cached else None,
        hits=seen.hits if seen else None, preempted=seen.preempted if seen else None,
        step_bound=(predicted.step.best, predicted.step.slow) if predicted else None,
        first_bound=(predicted.first_token.best, predicted.first_token.slow)
        if predicted and predicted.first_token else None,
        wrong=_impossible(of_step.get("p50"), alone),
    )  # fmt: skip


def _kept(one: Answered, slo: Slo) -> bool:
    if one.fault or one.first_seconds is None:
        return False
    step = one.step_seconds or 0.0
    return (slo.first is None or one.first_seconds <= slo.first) and (slo.step is None or step <= slo.step)


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    found = {name: percentile(ordered, share) for name, share in SHARES.items()} if ordered else {}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _within(found: dict[str, float | None], limit: float | None) -> bool:
    if limit is None or not found:
        return True
    at = found["p95"]
    return at is not None and at <= limit


def _faults(failed: Sequence[Answered]) -> dict[str, int]:
    counted = Counter(one.fault for one in failed)
    kept = dict(counted.most_common(MOST_FAULTS))
    rest = sum(counted.values()) - sum(kept.values())
    return kept | ({"others": rest} if rest else {})


def _impossible(step: float | None, alone: Estimate | None) -> str:
    if step is None or alone is None or step >= TOLERANCE * alone.step.best:
        return ""
    return f"{1e3 * step:.3g} ms a token beats the bound of {1e3 * alone.step.best:.3g} ms"
