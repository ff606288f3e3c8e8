"""Which pictures a run has, and the words that stand before and under them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qtool.convert.files.chosen import Chosen, read_chosen
from qtool.convert.files.manifest import Manifest
from qtool.report import budget_figures, figures, maps
from qtool.report.along import along_pictures
from qtool.report.figures import Point
from qtool.runs.coverage import Coverage, by_expert, by_kind, coverage
from qtool.runs.evidence import moved, p_text, size_text, task_label
from qtool.runs.informative import of_task
from qtool.runs.measurements import one_machine
from qtool.runs.record import RunRecord
from qtool.runs.summary import Summary

SHARED = "All artifacts with this measure share one scale of colours."
_LAYER = re.compile(r"\.layers\.(\d+)\.(.+)$")
# Ledger keys in order of preference, and what each is.
_ERRORS = {
    "error": "relative output error",
    "weighted_error": "relative weight error, weighted by importance",
    "frobenius": "relative weight error",
}


@dataclass(frozen=True)
class Picture:
    """``name`` is its file's name without .svg; ``section`` one of measured, size, kl, along, errors; ``narrow``: the
    same for a telephone."""

    name: str
    section: str
    title: str
    caption: str
    svg: str
    narrow: str


def _drawn(name: str, section: str, title: str, caption: str, draw: Callable[[int], str]) -> Picture:
    """``draw`` at both widths."""
    return Picture(name, section, title, caption, draw(figures.WIDTH), draw(figures.NARROW))


def verdict_of(run: RunRecord) -> tuple[str, str]:
    """(pass | fail | undecided, the headline): what the whole run comes to."""
    unsound = [name for name, checked in run.checks.items() if not checked.sound]
    if unsound:
        return "fail", f"Failed: {', '.join(unsound)} did not verify"
    count, failed = len(run.verdicts), sum(v.failed for v in run.verdicts)
    undecided = sum(v.verdict == "undecided" for v in run.verdicts)
    if failed:
        return "fail", f"Failed: {failed} of {count} gates not met"
    if undecided:
        return "undecided", f"Undecided: {undecided} of {count} gates need more data, none failed"
    if count:
        return "pass", f"Passed: {count} of {count} gates met"
    return "undecided", "Not judged: the recipe has no gates"


def cost_lines(run: RunRecord) -> list[tuple[str, str]]:
    """(artifact, a sentence): its size beside the source's, its KL, what it lost."""
    models = run.summary.models
    source = models["source"].size
    lines = []
    for name, model in models.items():
        if name == "source" or model.size is None or source is None:
            continue
        said = [f"{size_text(model.size.tensors)}, {model.size.tensors / source.tensors:.0%} of the source"]
        if model.text is not None:
            said.append(f"KL {model.text.kl.estimate:.4f}")
        for task, result in model.tasks.items():
            if why := of_task(run.summary, task):
                said.append(f"{task_label(task)} is {why}")
            elif (loss := result.loss) is not None:
                worse = loss.p_holm < 0.05 and loss.difference.loss.estimate > 0
                shown = f"{'a' if worse else 'no'} loss is shown, {p_text(loss.p_holm, loss.comparisons)}"
                said.append(f"{moved(loss.difference.loss)} on {task_label(task)} ({shown})")
        lines.append((name, "; ".join(said)))
    return lines


def pictures(run: RunRecord) -> list[Picture]:
    """Every picture that the run has data for."""
    summary = run.summary
    along = [_drawn(name, "along", title, caption, draw) for name, title, caption, draw in along_pictures(summary)]
    return [*_speeds(summary), *_sizes(summary), *_curves(run), *_kls(summary), *along, *_bits(run), *_errors(run)]


def _chosen(run: RunRecord) -> dict[str, Chosen]:
    """Of the artifacts whose types were chosen for a budget, and that are still there."""
    found = {name: read_chosen(folder) for name, folder in run.folders.items()}
    return {name: chosen for name, chosen in found.items() if chosen is not None}


def _curves(run: RunRecord) -> list[Picture]:
    found = []
    for number, (name, chosen) in enumerate(_chosen(run).items()):
        text = run.summary.models[name].text if name in run.summary.models else None
        measured = text.kl.estimate if text is not None and math.isfinite(text.kl.estimate) else None
        if len(budget_figures.near(chosen)) > 1:
            draw = partial(budget_figures.size_against_kl, chosen, measured)
            caption = (
                f"{chosen.said}. Expected is a second-order estimate on calibration text, measured is on held-out."
            )
            title = f"{name}: what other sizes would give"
            found.append(_drawn(f"budget-{number}-{_file(name)}", "size", title, caption, draw))
    return found


def _bits(run: RunRecord) -> list[Picture]:
    found = []
    for number, (name, chosen) in enumerate(_chosen(run).items()):
        values = {
            (int(place[1]), place[2]): bits for module, bits in chosen.bits.items() if (place := _LAYER.search(module))
        }
        outside = [f"{module} {chosen.mix[module]}" for module in chosen.mix if not _LAYER.search(module)]
        if values:
            title = f"{name}: bits of a weight"
            caption = f"The type that each matrix got for the budget. Outside the layers: {', '.join(outside)}."
            draw = partial(_bit_map, values, title)
            found.append(_drawn(f"bits-{number}-{_file(name)}", "errors", title, caption, draw))
    return found


def _bit_map(values: Mapping[tuple[int, str], float], title: str, room: int) -> str:
    return maps.heat_map(values, title, (2.0, 9.0), room, digits=2)


def _speeds(summary: Summary) -> list[Picture]:
    marks, engines = [], []
    for name, measurement in one_machine(summary.measured).items():
        row, size = measurement.first, summary.models[name].size
        if row is not None and row.step_seconds and size is not None:
            rate = 1 / row.step_seconds
            marks.append(Point(name, size.tensors, rate, rate, rate))
            engines.append(f"{name} by {measurement.engine}")
    if len(marks) < 2:
        return []
    draw = partial(figures.size_against, marks, "tokens/s, decoding", True)
    caption = f"One request's tokens after the first, medians: {', '.join(engines)}."
    return [_drawn("size-speed", "measured", "Size against speed", caption, draw)]


def rate_points(summary: Summary, task: str) -> list[Point]:
    """Each model whose size is known at its pass@1 (a fraction) on the task."""
    return [
        Point(name, model.size.tensors, rate.estimate, rate.low, rate.high)
        for name, model in summary.models.items()
        if model.size is not None and task in model.tasks
        for rate in [model.tasks[task].rate]
    ]


def kl_points(summary: Summary) -> list[Point]:
    """Each model whose size is known at its mean KL, where that is a number."""
    return [
        Point(name, model.size.tensors, kl.estimate, kl.low, kl.high)
        for name, model in summary.models.items()
        if model.size is not None and model.text is not None
        for kl in [model.text.kl]
        if math.isfinite(kl.estimate)
    ]


def _sizes(summary: Summary) -> list[Picture]:
    pictures = []
    aside = "Points of nearly one size are drawn side by side."
    for number, task in enumerate(summary.models["source"].tasks):
        marks = [
            replace(p, score=100 * p.score, low=100 * p.low, high=100 * p.high) for p in rate_points(summary, task)
        ]
        if not marks:
            continue
        label = task_label(task)
        draw = partial(figures.size_against, marks, f"{label}, % passed", True)
        caption = f"Bars are 95 % intervals of each score alone; the table's paired losses are sharper. {aside}"
        pictures.append(_drawn(f"size-score-{number}", "size", f"Size against {label}", caption, draw))
    marks = [replace(p, low=max(0.0, p.low)) for p in kl_points(summary)]
    if len(marks) > 1:
        draw = partial(figures.size_against, marks, "KL to source, nats a token", False)
        caption = f"Bars are 95 % bootstrap intervals over windows of held-out text. {aside}"
        pictures.append(_drawn("size-kl", "size", "Size against KL divergence", caption, draw))
    return pictures


def _kls(summary: Summary) -> list[Picture]:
    pictures = []
    measured = {name: model.texts for name, model in summary.models.items() if name != "source" and model.texts}
    for length in dict.fromkeys(length for texts in measured.values() for length in texts):
        texts = {name: by_length[length] for name, by_length in measured.items() if length in by_length}
        by_position = {name: text.kl_by_position for name, text in texts.items() if _drawable(text.kl_by_position)}
        if by_position:
            width = next(texts[name].position_bin for name in by_position)
            draw = partial(figures.kl_by_position, by_position, width)
            caption = f"Windows of {length} tokens; each point is the mean over all windows and {width} positions."
            pictures.append(_drawn(f"kl-by-position-{length}", "kl", "KL by token position", caption, draw))
    first = {name: next(iter(by_length.values())) for name, by_length in measured.items()}
    by_layer = {name: text.kl_by_layer for name, text in first.items() if _drawable(text.kl_by_layer)}
    if by_layer:
        caption = "Each layer in turn is the quantized one; all others are the source's."
        pictures.append(_drawn("kl-by-layer", "kl", "KL by layer", caption, partial(figures.kl_by_layer, by_layer)))
    return pictures


def _errors(run: RunRecord) -> list[Picture]:
    pictures, spans, expert_spans = (
        [],
        _spans(run, _by_place),
        _spans(run, lambda manifest, key: by_expert(manifest.ledger, key)),
    )
    reached_span = _span([coverage(manifest.ledger) for manifest in run.manifests.values()])
    for number, (name, manifest) in enumerate(run.manifests.items()):
        ledger = manifest.ledger
        key = _measure(manifest)
        if key is None:
            continue
        label, stem = _ERRORS[key], f"errors-{number}-{_file(name)}"
        values = _by_place(manifest, key)
        experts, reached = by_expert(ledger, key), coverage(ledger)
        title = f"{name}: {label}"
        if values:
            whole = f"Every linear of {name}{', of experts the mean of a layer' if experts else ''}: {label}."
            caption = f"{whole} {SHARED}"
            draw = partial(maps.heat_map, values, title, spans[key])
            pictures.append(_drawn(stem, "errors", title, caption, draw))
        if experts:
            caption = f"Every expert of {name}, the mean of its matrices: {label}. {SHARED}"
            draw = partial(maps.expert_map, experts, title, 4, expert_spans[key])
            pictures.append(_drawn(f"{stem}-experts", "errors", f"{title} by expert", caption, draw))
        if reached:
            title = f"{name}: calibration tokens by expert"
            caption = f"{reached.sentence} Experts that saw none have a red edge."
            draw = partial(maps.expert_map, reached.tokens, title, 0, reached_span)
            pictures.append(_drawn(f"tokens-{number}-{_file(name)}", "errors", title, caption, draw))
    return pictures


def _measure(manifest: Manifest) -> str | None:
    """Which error its ledger has, the one that tells most."""
    return next((key for key in _ERRORS if any(key in record for record in manifest.ledger.values())), None)


def _by_place(manifest: Manifest, key: str) -> dict[tuple[int, str], float]:
    """(layer, linear) -> its error."""
    found = {}
    for matrix, value in by_kind(manifest.ledger, key).items():
        if place := _LAYER.search(matrix):
            found[int(place[1]), place[2]] = value
    return found


def _span(reached: Sequence[Coverage | None]) -> tuple[float, float] | None:
    """The fewest and the most tokens that an expert saw, of all artifacts."""
    counts = [count for one in reached if one is not None for count in one.tokens.values()]
    return (min(counts), max(counts)) if counts else None


def _spans(run: RunRecord, places: Callable[[Manifest, str], Mapping[Any, float]]) -> dict[str, tuple[float, float]]:
    """Of each measure the least and the largest error of all artifacts, at ``places(manifest, measure)``."""
    spans: dict[str, tuple[float, float]] = {}
    for manifest in run.manifests.values():
        key = _measure(manifest)
        values = places(manifest, key).values() if key else ()
        if key and values:
            low, high = spans.get(key, (math.inf, -math.inf))
            spans[key] = min(low, *values), max(high, *values)
    return spans


def _drawable(values: Sequence[float]) -> bool:
    return bool(values) and all(map(math.isfinite, values))


def _file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name)
