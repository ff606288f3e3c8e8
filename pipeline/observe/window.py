"""What two readings of an engine's /metrics say of the time between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qtool.evaluate.engines.facts import Metrics
from qtool.evaluate.engines.scrape import Page, quantile

SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
Quantiles = dict[str, float]


@dataclass(frozen=True)
class Observation:
    """``seconds``: the window's length, None for the time since the server's start. ``cache`` (0 to 1, of the fullest
    engine), ``running`` and ``waiting`` are of its end; ``preempted`` counts in it; rates are tokens a second (None
    since the start: the page does not say when that was); ``hits``: share of the prompts' tokens found in the prefix
    cache; ``first`` and ``step``: seconds to the first token and between tokens; ``step_mean``: where there is no
    histogram. None: the engine does not say it, or nothing of the kind happened."""

    seconds: float | None
    cache: float | None
    running: float | None
    waiting: float | None
    preempted: float | None
    prompt_rate: float | None
    generated_rate: float | None
    hits: float | None
    first: Quantiles | None
    step: Quantiles | None
    step_mean: float | None
    restarted: bool = False

    @property
    def step_seconds(self) -> float | None:
        """Typical seconds of one decode step: the median, else the mean."""
        return self.step["p50"] if self.step else self.step_mean


def observe(before: Page | None, now: Page, metrics: Metrics) -> Observation:
    """``before``: an earlier reading; None: since the server's start."""
    counters = [metrics.preempted, metrics.prompt, metrics.generated, metrics.hits, *metrics.asked]
    restarted = before is not None and any(
        now.values.get(name, 0.0) < before.values.get(name, 0.0) for name in counters if name
    )
    earlier = None if restarted else before  # counters began again: what is there came after the restart

    def grown(name: str) -> float | None:
        value = now.values.get(name)
        return None if value is None else value - (earlier.values.get(name, 0.0) if earlier else 0.0)

    def share(parts: tuple[str, ...], of: tuple[str, ...]) -> float | None:
        above, below = [grown(name) for name in parts], [grown(name) for name in of]
        known = [value for value in (*above, *below) if value is not None]
        whole = sum(known[len(above) :])
        return sum(known[: len(above)]) / whole if len(known) == len(above) + len(below) and whole > 0 else None

    seconds = now.time - before.time if before else None

    def rate(name: str) -> float | None:
        value = grown(name)
        return None if value is None or not seconds else value / seconds

    return Observation(
        seconds=seconds,
        cache=now.most.get(metrics.cache),
        running=now.values.get(metrics.running),
        waiting=now.values.get(metrics.waiting),
        preempted=grown(metrics.preempted),
        prompt_rate=rate(metrics.prompt),
        generated_rate=rate(metrics.generated),
        hits=share((metrics.hits,), metrics.asked) if metrics.hits else None,
        first=_quantiles(earlier, now, metrics.first),
        step=_quantiles(earlier, now, metrics.step),
        step_mean=share(metrics.step_mean[:1], metrics.step_mean[1:]) if metrics.step_mean else None,
        restarted=restarted,
    )


def _quantiles(before: Page | None, now: Page, name: str) -> Quantiles | None:
    old: Mapping[float, float] = before.buckets.get(name, {}) if before else {}
    grown = {bound: count - old.get(bound, 0.0) for bound, count in now.buckets.get(name, {}).items()}
    found = {label: value for label, share in SHARES.items() if (value := quantile(grown, share)) is not None}
    return found or None
