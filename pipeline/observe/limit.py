"""Which limit binds a server: the cache, the memory bus, the arithmetic, or the queue before its slots.

A share of a bound is time: tokens a second times the least seconds that a machine of this kind could spend on one
(qtool.sizing.bounds). No share can pass 100 %; from `HIGH` on it is the limit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qtool.observe.window import Observation
from qtool.sizing.fit import estimate_of
from qtool.sizing.serving import PlannedServer

FULL = 0.9  # of the cache: above this, blocks run out between two readings
PEAK = 1.05  # of a card's rate, as in qtool.sizing.bounds
HIGH = 0.5  # of the best possible: above this no setting helps much, only more bandwidth, more arithmetic or less work


@dataclass(frozen=True)
class Shares:
    """Of the time that has passed: what the best machine of this kind would have needed for the tokens generated
    (``decode``, bound by ``decode_by``) and for the prompts (``prefill``)."""

    decode: float
    decode_by: str
    prefill: float | None


@dataclass(frozen=True)
class Verdict:
    """``limit``: cache, bandwidth, compute, queue, none, idle or unknown; ``why`` says what was seen, ``advice`` what
    helps. ``pseudo_oom``: no request fails and no memory error is logged, but a full cache makes the engine throw
    requests out and compute them again."""

    limit: str
    why: str
    advice: str = ""
    pseudo_oom: bool = False


def shares(seen: Observation, plan: PlannedServer) -> Shares | None:
    """None where the window says no rate."""
    if seen.generated_rate is None:
        return None
    sequences = max(1, round(seen.running or 0))
    cell = estimate_of(plan.setting, plan.serving.context, sequences)
    no_compute = replace(plan.setting, card=replace(plan.setting.card, bf16=None))
    by_bus = estimate_of(no_compute, plan.serving.context, sequences).step.best >= cell.step.best
    weights_only = estimate_of(plan.setting, 1, sequences).step.best  # sequences may be shorter than planned
    prefill = None
    if seen.prompt_rate is not None and plan.setting.card.bf16 is not None:
        g, fresh = plan.setting.geometry, seen.prompt_rate * (1 - (seen.hits or 0.0))
        linears = 2 * g.layer_linears * g.layers * g.loops  # without attention, which grows with lengths unknown here
        prefill = fresh * linears / (PEAK * plan.setting.card.bf16 * plan.setting.at_once)
    return Shares(seen.generated_rate / sequences * weights_only, "bandwidth" if by_bus else "compute", prefill)


def binding(seen: Observation, plan: PlannedServer | None) -> Verdict:
    """From what is certain to what is likely: preemptions, a full cache, a queue, then the bounds."""
    full = seen.cache is not None and seen.cache >= FULL
    cache = "" if seen.cache is None else f"the cache is {seen.cache:.0%} full"
    if seen.preempted:
        still = f" ({seen.cache:.0%} now)" if full else ""
        why = f"pseudo-OOM: the cache ran full{still}; {seen.preempted:.0f} preemptions, computed again from the start"
        return Verdict("cache", why, "fewer sequences at once, a shorter --max-model-len, a narrower cache type, or "
                       "more memory for the cache", True)  # fmt: skip
    if seen.waiting and full:
        return Verdict("cache", f"{seen.waiting:.0f} wait and {cache}", "a narrower cache type, or more cards")
    if seen.waiting:
        beside = f", though {cache}" if cache else ""
        why = f"{seen.waiting:.0f} wait for a slot while {seen.running or 0:.0f} run{beside}"
        return Verdict("queue", why, "more sequences at once (`qtool plan` says how many fit), or more servers")
    if not seen.running and not seen.generated_rate:
        return Verdict("idle", "no request runs, none ran")
    if plan is None:
        return Verdict("unknown", "no cache or queue binds; --artifact and --card tell bandwidth from compute")
    if plan.setting.card.processor:
        return Verdict("unknown", "no cache or queue binds; a processor's rates cannot be told beside a server at work")
    found = shares(seen, plan)
    if found is None:
        return Verdict("unknown", "the engine does not say how many tokens it makes")
    prefill = found.prefill or 0.0
    most, by = (found.decode, found.decode_by) if found.decode >= prefill else (prefill, "compute")
    why = f"decoding takes {found.decode:.0%} of the time at best, prompts {prefill:.0%}"
    return Verdict(by if most >= HIGH else "none", why)
