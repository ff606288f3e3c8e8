"""Prometheus alert rules and a Grafana dashboard, whose limits are the plan's.

Formats: https://prometheus.io/docs/prometheus/latest/configuration/alerting_rules (promtool checks it) and
https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model.
"""

from __future__ import annotations

import json
from typing import Any

from qtool.bundle.queries import Asked, Query, queries
from qtool.bundle.target import Target
from qtool.observe.limit import FULL

GRAFANA_SCHEMA = 39  # of the dashboard's JSON model, Grafana 10 and later
COLUMNS, HEIGHT = 2, 8


def alerts(target: Target) -> dict[str, Any]:
    """Rules that fire where the server leaves its plan."""
    asked = _asked(target)
    rules = [_gone(asked), *_cache(target, asked), _queue(target, asked), *_slow(target, asked)]
    return {"groups": [{"name": f"qtool-{target.label}", "rules": rules}]}


def _asked(target: Target) -> Asked:
    metrics = target.server.facts.metrics
    assert metrics is not None
    return Asked(metrics, tuple(filter(None, (target.name, target.repository))))  # charts serve it as its Hub id


def _rule(name: str, expr: str, wait: str, severity: str, summary: str, description: str) -> dict[str, Any]:
    return {
        "alert": name, "expr": expr, "for": wait, "labels": {"severity": severity},
        "annotations": {"summary": summary, "description": description},
    }  # fmt: skip


def _gone(asked: Asked) -> dict[str, Any]:
    running = asked.metrics.running
    return _rule("ServerGone", f"absent({asked.of(running)})", "2m", "critical", "No server of this model is scraped",
                 f"No {running} for two minutes.")  # fmt: skip


def _cache(target: Target, asked: Asked) -> list[dict[str, Any]]:
    m, s = asked.metrics, target.server.serving
    found = []
    if m.preempted:
        text = f"planned: {s.sequences} users of {s.context:,} tokens fit without a preemption. Requests lose their " \
               "cache and are computed again: nothing fails, all gets slower."  # fmt: skip
        found.append(_rule("CacheThrashing", f"{asked.grown(m.preempted)} > 0", "0m", "critical",
                           "Pseudo-OOM: requests are thrown out of a full cache", text))  # fmt: skip
    if m.cache:
        expr = f"{asked.largest(m.cache)} > {FULL} and {asked.total(m.waiting)} > 0"
        found.append(_rule("CacheFull", expr, "5m", "warning", "The cache is full and requests wait for it",
                           f"Above {FULL:.0%} for five minutes."))  # fmt: skip
    return found


def _queue(target: Target, asked: Asked) -> dict[str, Any]:
    return _rule("Queue", f"{asked.total(asked.metrics.waiting)} > 0", "5m", "warning", "Requests wait for a slot",
                 f"planned: {target.server.serving.sequences} at once; more than that have come for five "
                 "minutes.")  # fmt: skip


def _slow(target: Target, asked: Asked) -> list[dict[str, Any]]:
    m = asked.metrics
    cell, s = target.server.estimate, target.server.serving
    found = []
    if m.first and cell.first_token is not None and cell.first_token.slow is not None:
        slow = cell.first_token.slow
        found.append(_rule(
            "SlowFirstToken", f"{asked.quantile(m.first, 0.95)} > {slow:.3g}", "5m", "warning",
            "First tokens come later than planned",
            f"p95 above {slow:.3g} s, the slowest expected with {s.sequences} prompts of {s.context:,} tokens at once.",
        ))  # fmt: skip
    slow_step = cell.step.slow
    if slow_step is not None and (m.step or m.step_mean):
        measured = asked.quantile(m.step, 0.95) if m.step else queries(asked)["step"].lines["mean"]
        what = "p95" if m.step else "the mean"
        found.append(_rule(
            "SlowTokens", f"{measured} > {slow_step:.3g}", "5m", "warning", "Tokens come slower than planned",
            f"{what} above {slow_step:.3g} s a token, the slowest expected with {s.sequences} users.",
        ))  # fmt: skip
    return found


def dashboard(target: Target, note: str) -> str:
    """One panel for each thing that the engine says, the plan's limits drawn into it."""
    limits = _limits(target)
    panels = [
        _panel(number, query, limits.get(name)) for number, (name, query) in enumerate(queries(_asked(target)).items())
    ]
    return json.dumps({
        "title": f"{target.name} ({target.server.facts.name})",
        "uid": f"qtool-{target.label}"[:40],
        "description": note,
        "schemaVersion": GRAFANA_SCHEMA,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "tags": ["qtool"],
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus", "label": "source"}]},
        "panels": panels,
    }, indent=2) + "\n"  # fmt: skip


def _limits(target: Target) -> dict[str, tuple[float, str]]:
    """What a panel's line says -> (value, what it is)."""
    cell, s = target.server.estimate, target.server.serving
    found = {"cache": (FULL, "above it, requests are thrown out"), "requests": (float(s.sequences), "planned at once")}
    if cell.first_token is not None and cell.first_token.slow is not None:
        found["first"] = (cell.first_token.slow, f"slowest planned, {s.sequences} x {s.context:,} tokens")
    if cell.step.slow is not None:
        found["step"] = (cell.step.slow, f"slowest planned, {s.sequences} users")
    return found


def _panel(number: int, query: Query, limit: tuple[float, str] | None) -> dict[str, Any]:
    column, row = number % COLUMNS, number // COLUMNS
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    custom: dict[str, Any] = {}
    if limit is not None:
        steps.append({"color": "red", "value": float(f"{limit[0]:.4g}")})
        custom = {"thresholdsStyle": {"mode": "line"}}
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": query.title,
        "description": f"the line: {limit[0]:.4g}, {limit[1]}" if limit else "",
        "datasource": source,
        "gridPos": {"x": column * (24 // COLUMNS), "y": row * HEIGHT, "w": 24 // COLUMNS, "h": HEIGHT},
        "fieldConfig": {
            "defaults": {"unit": query.unit, "custom": custom, "thresholds": {"mode": "absolute", "steps": steps}},
            "overrides": [],
        },
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": expr, "legendFormat": legend}
            for i, (legend, expr) in enumerate(query.lines.items())
        ],
    }
