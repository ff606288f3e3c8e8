"""What a long text and conditions of the cache came to: a table, pictures, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from qtool.evaluate.buckets import tokens_text
from qtool.evaluate.statistics import Interval
from qtool.report import figures
from qtool.report.figures import Point
from qtool.report.tables import Row
from qtool.runs.along import AlongSummary, Bucket
from qtool.runs.evidence import size_text
from qtool.runs.summary import Summary

TITLE = "Along a long text"
Drawn = tuple[str, str, str, Callable[[int], str]]  # name, title, caption, what draws it at a width


def along_rows(summary: Summary) -> list[Row]:
    """A row for each model under each condition."""
    return [
        {"model": name, "cache": condition or "own"} | _cells(found, name == "source" and not condition)
        for name, model in summary.models.items()
        for condition, found in model.along.items()
    ]


def _cells(found: AlongSummary, is_reference: bool) -> Row:
    cells = {"cache size": size_text(found.cache_bytes)}
    if not is_reference:
        for bucket in found.buckets:
            cells[f"KL {bucket.name}"] = _interval(bucket.kl)
        cells["top-1 at the end"] = f"{found.buckets[-1].top1.estimate:.1%}"
    cells |= {f"perplexity {bucket.name}": f"{bucket.perplexity:.3f}" for bucket in _ends(found)}
    rise = found.buckets[-1].rise
    return cells | ({"log-loss at the end": f"{_interval(rise, '+')}"} if rise is not None else {})


def _ends(found: AlongSummary) -> list[Bucket]:
    return found.buckets[:1] + found.buckets[1:][-1:]


def _interval(value: Interval, sign: str = "") -> str:
    if math.isnan(value.estimate):
        return "not a number"
    return f"{value.estimate:{sign}.4f} [{value.low:{sign}.4f}, {value.high:{sign}.4f}]"


def along_note(summary: Summary) -> str:
    """What the columns mean."""
    found = next((one for model in summary.models.values() for one in model.along.values()), None)
    if found is None:
        return ""
    simulated = any("simulated" in condition for model in summary.models.values() for condition in model.along)
    said = [
        f"One text of {found.length:,} tokens. KL: mean divergence from the source with its whole cache, nats a token, "
        "in buckets of positions; brackets: 95 % intervals over blocks of neighbouring positions.",
        "Cache size: keys and values of one sequence at the text's end, without an engine's padding; `own` is 16 bits "
        "a number.",
        "Log-loss at the end: nats a token above the source's under the same condition, paired by block, in the last "
        "bucket. Rows of two conditions are not compared with one another.",
    ]
    said += ["Simulated: numbers were rounded as such a cache stores them; no kernel of it ran."] if simulated else []
    return " ".join(said)


def along_pictures(summary: Summary) -> list[Drawn]:
    """KL against position, for each condition; the last bucket's KL against the bytes of the cache."""
    found: list[Drawn] = []
    conditions = dict.fromkeys(condition for model in summary.models.values() for condition in model.along)
    by_condition: dict[str, dict[str, AlongSummary]] = {condition: {} for condition in conditions}
    for name, model in summary.models.items():
        for condition, along in model.along.items():
            if (name != "source" or condition) and all(math.isfinite(b.kl.estimate) for b in along.buckets):
                by_condition[condition][name] = along
    by_condition = {condition: models for condition, models in by_condition.items() if models}
    for number, (condition, models) in enumerate(by_condition.items()):
        first = next(iter(models.values()))
        series = {name: [bucket.kl for bucket in along.buckets] for name, along in models.items()}
        draw = partial(figures.kl_by_bucket, series, [tokens_text(bucket.end) for bucket in first.buckets])
        kept = f" Cache: {condition}." if condition else ""
        caption = f"One text of {first.length:,} tokens; each point is a bucket that ends there.{kept}"
        found.append((f"kl-along-{number}", f"KL along the text{f', {condition}' if condition else ''}", caption, draw))
    if len(by_condition) > 1:
        points = [
            Point(f"{name} {condition}".strip(), along.cache_bytes, kl.estimate, max(0.0, kl.low), kl.high)
            for condition, models in by_condition.items()
            for name, along in models.items()
            for kl in [along.buckets[-1].kl]
        ]
        draw = partial(figures.size_against, points, "KL to source, nats a token", False, of="the cache")
        caption = "The last bucket of positions against the bytes that one sequence keeps."
        found.append(("kl-cache", "Quality against cache bytes", caption, draw))
    return found
