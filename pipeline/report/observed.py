"""`qtool watch` as people read it: one table, the limit that binds, and what the engine does not say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtool.evaluate.engines.facts import Metrics
from qtool.observe.limit import Verdict
from qtool.observe.window import Observation, Quantiles
from qtool.report.tables import rate_text
from qtool.sizing.bounds import Range
from qtool.sizing.fit import estimate_of
from qtool.sizing.serving import PlannedServer

UNKNOWN, NONE = "not said", "-"
COLOURS = {"cache": "red", "queue": "yellow", "bandwidth": "cyan", "compute": "cyan"}


@dataclass(frozen=True)
class Reading:
    """All that one refresh shows. ``lately``: the window; ``ever``: since the server's start."""

    url: str
    engine: str
    metrics: Metrics
    lately: Observation
    ever: Observation
    missing: Mapping[str, Sequence[str]]
    plan: PlannedServer | None
    verdict: Verdict


def rows(reading: Reading) -> list[tuple[str, str, str, str]]:
    """(what, in the window, since the start, planned)."""
    now, ever, said = reading.lately, reading.ever, reading.metrics
    bounds = _bounds(reading)
    return [
        ("cache in use", _text(said.cache, now.cache, "{:.0%}"), "", bounds["cache"]),
        ("requests running", _text(said.running, now.running, "{:.0f}"), "", bounds["running"]),
        ("requests waiting", _text(said.waiting, now.waiting, "{:.0f}"), "", ""),
        ("preemptions", _text(said.preempted, now.preempted, "{:.0f}"), _text(said.preempted, ever.preempted, "{:.0f}"),
         "0" if reading.plan else ""),
        ("prefix hits", _text(said.hits, now.hits, "{:.0%}"), _text(said.hits, ever.hits, "{:.0%}"), ""),
        ("prompt tok/s", _rate(now.prompt_rate), "", ""),
        ("generated tok/s", _rate(now.generated_rate), "", bounds["rate"]),
        *_latencies("first token", said.first, now.first, ever.first, bounds["first"]),
        *(_latencies("between tokens", said.step, now.step, ever.step, bounds["step"]) if said.step else [
            ("between tokens, mean", _seconds(now.step_mean), _seconds(ever.step_mean), bounds["step"])
        ]),
    ]  # fmt: skip


def table(reading: Reading) -> RenderableType:
    """What is drawn again and again."""
    window = "now" if reading.lately.seconds is None else f"last {reading.lately.seconds:.1f} s"
    found = Table(title=Text(f"{reading.url} ({reading.engine})"), box=None, pad_edge=False, title_justify="left")
    for header in ("", window, "since start", "planned"):
        found.add_column(header, justify="left" if header in ("", "planned") else "right")
    for row in rows(reading):
        found.add_row(*row)
    style = COLOURS.get(reading.verdict.limit, "green")
    lines = [Text(f"limit: {reading.verdict.limit}. {reading.verdict.why}", style=style)]
    lines += [Text(f"  helps: {reading.verdict.advice}")] if reading.verdict.advice else []
    return Group(found, *lines, *(Text(note, style="dim") for note in notes(reading)))


def line(reading: Reading) -> str:
    """Without a terminal: everything that moves, in one line."""
    now = reading.lately
    parts = [
        f"cache {_text('x', now.cache, '{:.0%}')}", f"running {_text('x', now.running, '{:.0f}')}",
        f"waiting {_text('x', now.waiting, '{:.0f}')}", f"preempted {_text('x', now.preempted, '{:.0f}')}",
        f"hits {_text('x', now.hits, '{:.0%}')}", f"{_rate(now.generated_rate)} tok/s",
    ]  # fmt: skip
    for name, found in (("first", now.first), ("step", now.step)):
        parts += [f"{name} p95 {_seconds(found['p95'])}"] if found else []
    return f"{', '.join(parts)} | limit: {reading.verdict.limit}. {reading.verdict.why}"


def notes(reading: Reading) -> list[str]:
    """What the page lacks, and whose numbers the planned ones are."""
    said = []
    if reading.missing:
        names = ", ".join(name for names in reading.missing.values() for name in names)
        why = f"{reading.metrics.since} has them" + (", once they were used" if reading.metrics.late else "")
        said.append(f"this server's /metrics lacks {names}; {why}. They count as not said.")
    silent = [word for word, name in (("cache use", reading.metrics.cache), ("preemptions", reading.metrics.preempted),
                                      ("time to first token", reading.metrics.first)) if not name]  # fmt: skip
    if silent:
        said.append(f"{reading.engine} says nothing of {', '.join(silent)}.")
    if reading.lately.restarted:
        said.append("the server was started again since the last reading.")
    if (plan := reading.plan) is not None:
        s = plan.serving
        speeds = "; from the bound that no machine beats to the slowest expected" * (not plan.setting.card.processor)
        card = f"{s.cards} x {plan.setting.card.key}"
        said.append(f"planned: {plan.headers.name} on {card}, {s.context:,} tokens x {s.sequences}{speeds}.")
    return said


def _bounds(reading: Reading) -> dict[str, str]:
    plan, running = reading.plan, reading.lately.running
    if plan is None:
        return dict.fromkeys(("cache", "running", "rate", "first", "step"), "")
    context, users = plan.serving.context, plan.serving.sequences
    cell = estimate_of(plan.setting, context, max(1, round(running or users)))
    of = f"{cell.sequences} at once"
    held = {
        "cache": f"{plan.estimate.cache / 2**30:.2f} GiB hold {users} of {context:,}",
        "running": f"at most {users}",
    }
    if plan.setting.card.processor:  # its rates were measured just now, beside the server's own work: no bounds
        return held | dict.fromkeys(("rate", "first", "step"), "")
    return held | {
        "rate": f"{_range_of_rate(cell.step.per_second(cell.sequences))} ({of})",
        "first": "" if cell.first_token is None else f"{_range(cell.first_token)} ({context:,} tokens, {of})",
        "step": f"{_range(cell.step)} ({of})",
    }


def _latencies(
    what: str, name: str, now: Quantiles | None, ever: Quantiles | None, planned: str
) -> list[tuple[str, str, str, str]]:  # fmt: skip
    if not name:
        return [(f"{what}, p50", UNKNOWN, UNKNOWN, planned)]
    return [
        (f"{what}, {share}", _seconds(now[share]) if now else NONE, _seconds(ever[share]) if ever else NONE,
         planned if share == "p50" else "")
        for share in ("p50", "p95", "p99")
    ]  # fmt: skip


def _text(name: str, value: float | None, form: str) -> str:
    if not name:
        return UNKNOWN
    return NONE if value is None else form.format(value)


def _rate(value: float | None) -> str:
    return NONE if value is None else rate_text(value)


def _seconds(value: float | None) -> str:
    if value is None:
        return NONE
    if math.isinf(value):
        return "beyond the last bucket"
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _range(seconds: Range) -> str:
    return f"{_seconds(seconds.best)} to {_seconds(seconds.slow)}"


def _range_of_rate(rate: Range) -> str:
    return f"{_rate(rate.slow)} to {_rate(rate.best)}"
