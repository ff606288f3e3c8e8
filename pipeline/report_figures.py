"""Which pictures a run has, and the words that stand before and under them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from qtool import figures
from qtool.evaluate.rates import mean_rate
from qtool.figures import Point
from qtool.measurements import one_machine
from qtool.record import RunRecord
from qtool.tables import losses, mean_kl, moved, size_text, task_label

_LAYER = re.compile(r"\.layers\.(\d+)\.(.+)$")
# Ledger keys in order of preference, and what each is.
_ERRORS = {
    "error": "relative output error",
    "weighted_error": "relative weight error, weighted by importance",
    "frobenius": "relative weight error",
}


@dataclass(frozen=True)
class Picture:
    """``name`` is its file's name without .svg; ``section`` one of measured, size, kl, errors."""

    name: str
    section: str
    title: str
    caption: str
    svg: str


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
    compared = losses(run.scores)
    source = run.sizes["source"][0]
    lines = []
    for name, manifest in run.manifests.items():
        said = [f"{size_text(manifest.tensor_bytes)}, {manifest.tensor_bytes / source:.0%} of the source"]
        if name in run.scores.fidelity:
            said.append(f"KL {mean_kl(run.scores.fidelity[name]).estimate:.4f}")
        for (subject, task), (difference, p) in compared.items():
            if subject == name:
                shown = "a loss is shown" if p < 0.05 and difference.loss.estimate > 0 else "no loss is shown"
                said.append(f"{moved(difference)} on {task_label(task)} ({shown}, p={p:.2g})")
        lines.append((name, "; ".join(said)))
    return lines


def pictures(run: RunRecord) -> list[Picture]:
    """Every picture that the run has data for."""
    return [*_speeds(run), *_sizes(run), *_kls(run), *_errors(run)]


def _speeds(run: RunRecord) -> list[Picture]:
    marks, engines = [], []
    for name, measurement in one_machine(run.measured).items():
        row = measurement.first
        if row is not None and row.step_seconds and name in run.sizes:
            rate = 1 / row.step_seconds
            marks.append(Point(name, run.sizes[name][0], rate, rate, rate))
            engines.append(f"{name} by {measurement.engine}")
    if len(marks) < 2:
        return []
    svg = figures.size_against(marks, "tokens/s, decoding", True)
    caption = f"One request's tokens after the first, medians: {', '.join(engines)}."
    return [Picture("size-speed", "measured", "Size against speed", caption, svg)]


def _sizes(run: RunRecord) -> list[Picture]:
    found = []
    aside = "Points of nearly one size are drawn side by side."
    for number, task in enumerate(run.scores.tasks.get("source", {})):
        marks = []
        for name, tasks in run.scores.tasks.items():
            if task in tasks and name in run.sizes:
                rate = mean_rate(tasks[task].solved, tasks[task].samples)
                marks.append(Point(name, run.sizes[name][0], 100 * rate.estimate, 100 * rate.low, 100 * rate.high))
        label = task_label(task)
        svg = figures.size_against(marks, f"{label}, % passed", True)
        caption = f"Bars are 95 % intervals of each score alone; the table's paired losses are sharper. {aside}"
        found.append(Picture(f"size-score-{number}", "size", f"Size against {label}", caption, svg))
    marks = []
    for name, score in run.scores.fidelity.items():
        kl = mean_kl(score)
        if name in run.sizes and math.isfinite(kl.estimate):
            marks.append(Point(name, run.sizes[name][0], kl.estimate, max(0.0, kl.low), kl.high))
    if len(marks) > 1:
        svg = figures.size_against(marks, "KL to source, nats a token", False)
        caption = f"Bars are 95 % bootstrap intervals over windows of held-out text. {aside}"
        found.append(Picture("size-kl", "size", "Size against KL divergence", caption, svg))
    return found


def _kls(run: RunRecord) -> list[Picture]:
    found = []
    measured = {name: scores for name, scores in run.scores.contexts.items() if name != "source"}
    for length in dict.fromkeys(length for scores in measured.values() for length in scores):
        scores = {name: by_length[length] for name, by_length in measured.items() if length in by_length}
        by_position = {name: score.kl_by_position for name, score in scores.items() if _drawable(score.kl_by_position)}
        if by_position:
            width = next(scores[name].position_bin for name in by_position)
            svg = figures.kl_by_position(by_position, width)
            caption = f"Windows of {length} tokens; each point is the mean over all windows and {width} positions."
            found.append(Picture(f"kl-by-position-{length}", "kl", "KL by token position", caption, svg))
    scores = {name: score for name, score in run.scores.fidelity.items() if name != "source"}
    by_layer = {name: score.kl_by_layer for name, score in scores.items() if _drawable(score.kl_by_layer)}
    if by_layer:
        caption = "Each layer in turn is the quantized one; all others are the source's."
        found.append(Picture("kl-by-layer", "kl", "KL by layer", caption, figures.kl_by_layer(by_layer)))
    return found


def _errors(run: RunRecord) -> list[Picture]:
    found = []
    for number, (name, manifest) in enumerate(run.manifests.items()):
        records = manifest.ledger.values()
        key = next((key for key in _ERRORS if any(key in record for record in records)), None)
        values = {}
        for linear, record in manifest.ledger.items():
            place = _LAYER.search(linear)
            if place and key in record:
                values[int(place[1]), place[2]] = record[key]
        if key is not None and values:
            label = _ERRORS[key]
            svg = figures.heat_map(values, f"{name}: {label}")
            caption = f"Every linear of {name}: {label}. The colours span this artifact's own range."
            found.append(Picture(f"errors-{number}-{_file(name)}", "errors", f"{name}: {label}", caption, svg))
    return found


def _drawable(values: Sequence[float]) -> bool:
    return bool(values) and all(map(math.isfinite, values))


def _file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name)
