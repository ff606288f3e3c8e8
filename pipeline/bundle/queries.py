"""What dashboards and alert rules ask Prometheus, in the names that the engine's own page has."""

from __future__ import annotations

from dataclasses import dataclass

from qtool.evaluate.engines.facts import Metrics

WINDOW = "5m"


@dataclass(frozen=True)
class Query:
    """``unit``: as Grafana names it."""

    title: str
    unit: str
    lines: dict[str, str]  # legend -> PromQL


def queries(metrics: Metrics) -> dict[str, Query]:
    """Everything that the engine says, each under the name of what it says."""
    m = metrics
    found: dict[str, Query] = {}
    if m.cache:
        found["cache"] = Query("Cache in use", "percentunit", {"in use": f"max({m.cache})"})
    found["requests"] = Query("Requests", "short", {"running": f"sum({m.running})", "waiting": f"sum({m.waiting})"})
    if m.preempted:
        found["preempted"] = Query(
            "Preemptions (pseudo-OOM)", "short", {"in 5 minutes": f"sum(increase({m.preempted}[{WINDOW}]))"}
        )
    found["tokens"] = Query("Tokens a second", "short", {"prompt": _rate(m.prompt), "generated": _rate(m.generated)})
    if m.first:
        found["first"] = Query("Time to first token", "s", _shares(m.first))
    if m.step:
        found["step"] = Query("Time between tokens", "s", _shares(m.step))
    elif m.step_mean:
        seconds, tokens = m.step_mean
        found["step"] = Query("Time between tokens", "s", {"mean": f"{_rate(seconds)} / {_rate(tokens)}"})
    if m.hits:
        asked = " + ".join(_rate(name) for name in m.asked)
        found["hits"] = Query("Prefix cache hits", "percentunit", {"of prompt tokens": f"{_rate(m.hits)} / ({asked})"})
    return found


def quantile(name: str, share: float) -> str:
    """Of a histogram of all servers."""
    return f"histogram_quantile({share}, sum by (le) (rate({name}_bucket[{WINDOW}])))"


def _rate(name: str) -> str:
    return f"sum(rate({name}[{WINDOW}]))"


def _shares(name: str) -> dict[str, str]:
    return {f"p{round(100 * share)}": quantile(name, share) for share in (0.5, 0.95, 0.99)}
