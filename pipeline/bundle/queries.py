"""What dashboards and alert rules ask Prometheus, in the names that the engine's own page has."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qtool.evaluate.engines.facts import Metrics

WINDOW = "5m"


@dataclass(frozen=True)
class Query:
    """``unit``: as Grafana names it."""

    title: str
    unit: str
    lines: dict[str, str]  # legend -> PromQL


@dataclass(frozen=True)
class Asked:
    """The engine's page as Prometheus has it. ``models``: names that the server may call its model; where the page says
    which model a line is of, other models' lines are left out."""

    metrics: Metrics
    models: tuple[str, ...]

    def of(self, name: str) -> str:
        """One metric."""
        if not self.metrics.label:
            return name
        pattern = "|".join(re.sub(r"([\\.+*?()\[\]{}|^$])", r"\\\1", model) for model in self.models)
        quoted = pattern.replace("\\", "\\\\").replace('"', '\\"')
        return f'{name}{{{self.metrics.label}=~"{quoted}"}}'

    def largest(self, name: str) -> str:
        return f"max({self.of(name)})"

    def total(self, name: str) -> str:
        return f"sum({self.of(name)})"

    def rate(self, name: str) -> str:
        return f"sum(rate({self.of(name)}[{WINDOW}]))"

    def grown(self, name: str) -> str:
        return f"sum(increase({self.of(name)}[{WINDOW}]))"

    def quantile(self, name: str, share: float) -> str:
        """Of a histogram of all servers."""
        return f"histogram_quantile({share}, sum by (le) (rate({self.of(name + '_bucket')}[{WINDOW}])))"


def queries(asked: Asked) -> dict[str, Query]:
    """Everything that the engine says, each under the name of what it says."""
    m = asked.metrics
    found: dict[str, Query] = {}
    if m.cache:
        found["cache"] = Query("Cache in use", "percentunit", {"in use": asked.largest(m.cache)})
    lines = {"running": asked.total(m.running), "waiting": asked.total(m.waiting)}
    found["requests"] = Query("Requests", "short", lines)
    if m.preempted:
        found["preempted"] = Query("Preemptions (pseudo-OOM)", "short", {"in 5 minutes": asked.grown(m.preempted)})
    tokens = {"prompt": asked.rate(m.prompt), "generated": asked.rate(m.generated)}
    found["tokens"] = Query("Tokens a second", "short", tokens)
    if m.first:
        found["first"] = Query("Time to first token", "s", _shares(asked, m.first))
    if m.step:
        found["step"] = Query("Time between tokens", "s", _shares(asked, m.step))
    elif m.step_mean:
        seconds, made = m.step_mean
        found["step"] = Query("Time between tokens", "s", {"mean": f"{asked.rate(seconds)} / {asked.rate(made)}"})
    if m.hits:
        looked_up = " + ".join(asked.rate(name) for name in m.asked)
        share = f"{asked.rate(m.hits)} / ({looked_up})"
        found["hits"] = Query("Prefix cache hits", "percentunit", {"of prompt tokens": share})
    return found


def _shares(asked: Asked, name: str) -> dict[str, str]:
    return {f"p{round(100 * share)}": asked.quantile(name, share) for share in (0.5, 0.95, 0.99)}
