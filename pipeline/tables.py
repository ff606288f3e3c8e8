"""The score table as rows of text: size, perplexity, KL, each task with its interval and its paired loss, and what was
measured of memory and speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from qtool.evaluate.rates import mean_rate, rate_difference
from qtool.evaluate.regression import Difference, Interval, bootstrap_mean, holm, recovery
from qtool.evaluate.scorecard import FidelityScore, pass_at_k
from qtool.measurements import Measurement, one_machine
from qtool.scores import Scores, Sizes

GIB = 2**30
Row = dict[str, str]
Measured = Mapping[str, list[Measurement]]  # subject -> its measurements, the newest first
NOTHING: Measured = {}


def losses(scores: Scores) -> dict[tuple[str, str], tuple[Difference, float]]:
    """(artifact, task) -> its paired difference to the source, and p adjusted (Holm) over all of them."""
    source = scores.tasks.get("source", {})
    found = {
        (name, task): rate_difference(source[task].solved, score.solved, score.samples)
        for name, tasks in scores.tasks.items()
        for task, score in tasks.items()
        if name != "source" and task in source
    }
    adjusted = holm([difference.p for difference in found.values()])
    return {key: (difference, p) for (key, difference), p in zip(found.items(), adjusted, strict=True)}


def score_rows(scores: Scores, known: Sizes, measured: Measured = NOTHING) -> list[Row]:
    """One row for each subject; a cell nobody measured is left out."""
    compared, source, speeds = losses(scores), scores.tasks.get("source", {}), one_machine(measured)
    rows = []
    for name in dict.fromkeys([*known, *scores.fidelity, *scores.tasks]):
        row = {"model": name}
        if name in known:
            nbytes, bpw = known[name]
            row |= {"size": size_text(nbytes), "bits": f"{bpw:.2f} bpw"}
        for length, fidelity in scores.contexts.get(name, {}).items():
            row |= _fidelity_cells(name, fidelity, "" if fidelity is scores.fidelity[name] else f", {length} tokens")
        for task, score in scores.tasks.get(name, {}).items():
            interval = mean_rate(score.solved, score.samples)
            label = task_label(task) if score.samples == 1 else f"{task_label(task)}, pass@1 of {score.samples}"
            row[label] = f"{interval.estimate:.1%} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
            for k in (10, 100):
                if 1 < k <= score.samples:
                    several = bootstrap_mean([pass_at_k(score.samples, c, k) for c in score.solved])
                    span = f"[{100 * several.low:.1f}, {100 * several.high:.1f}]"
                    row[f"{task_label(task)}, pass@{k}"] = f"{several.estimate:.1%} {span}"
            if (name, task) in compared:
                difference, p = compared[name, task]
                row[f"{label}: points lost"] = f"{points(difference)}, p={p:.2g}"
                if any(source[task].solved):
                    kept = recovery(difference, sum(source[task].rates) / len(source[task].rates))
                    span = f"[{100 * kept.low:.1f}, {100 * kept.high:.1f}]"
                    row[f"{label}: recovery"] = f"{kept.estimate:.1%} {span}"
        rows.append(row | (_speed_cells(speeds[name]) if name in speeds else {}))
    return rows


def points(difference: Difference) -> str:
    """`1.8 [-1.1, 4.6]`; never -0.0."""
    loss = difference.loss
    estimate, low, high = (round(x, 1) + 0.0 for x in (loss.estimate, loss.low, loss.high))
    return f"{estimate:.1f} [{low:.1f}, {high:.1f}]"


def moved(difference: Difference) -> str:
    """`1.8 points lost [-1.1, 4.6]`, or `1.0 points gained [-2.0, 4.0]`."""
    loss = difference.loss
    if round(loss.estimate, 1) >= 0:
        return points(difference).replace(" [", " points lost [")
    estimate, low, high = (round(-x, 1) + 0.0 for x in (loss.estimate, loss.high, loss.low))
    return f"{estimate:.1f} points gained [{low:.1f}, {high:.1f}]"


def footnote(scores: Scores, measured: Measured = NOTHING) -> str:
    """What brackets, p and the measured columns mean in this table."""
    bracketed = any(scores.tasks.values()) or len(scores.fidelity) > 1
    parts = ["Brackets: 95 % intervals."] if bracketed else []
    if compared := losses(scores):
        sampled = any(score.samples > 1 for tasks in scores.tasks.values() for score in tasks.values())
        test = "paired permutation test" if sampled else "McNemar test"
        many = f", Holm-adjusted over the {len(compared)} comparisons of this table" if len(compared) > 1 else ""
        parts.append(f"p: exact {test} against the source{many}.")
        shown = [d.detectable for d, _ in compared.values() if d.detectable is not None]
        if shown:
            parts.append(f"Losses of about {max(shown):.1f} points and more would show (80 % power).")
    if len(scores.fidelity) > 1:
        parts.append("KL: mean divergence from the source in nats a token.")
    if compared:
        parts.append("Recovery: score in % of the source's, with the paired loss's interval.")
    return " ".join([*parts, *_speed_notes(measured), *caveats(scores)])


def caveats(scores: Scores) -> list[str]:
    """What a score does not cover, or could not exclude; one sentence each."""
    said = []
    for task, score in next(iter(scores.tasks.values()), {}).items():
        if score.left_out:
            missing = count_of(len(score.left_out), "problem")
            said.append(f"{task_label(task)}: {missing} of the benchmark could not be asked here.")
        if score.in_process:
            many = f"{score.in_process} of {len(score.outcomes)} programs"
            said.append(f"{task_label(task)}: {many} shared a process with their test and could have forged a pass.")
        if score.sandbox == "none":
            said.append(f"{task_label(task)}: the programs ran without a sandbox.")
    return said


def count_of(number: int, noun: str) -> str:
    """`1 problem`, `2 problems`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def mean_kl(score: FidelityScore) -> Interval:
    """Mean over windows with its bootstrap interval; NaN where the model's output was no number."""
    if not all(map(math.isfinite, score.kl)):
        return Interval(math.nan, math.nan, math.nan)
    return bootstrap_mean(score.kl)


def perplexity(nll: Sequence[float]) -> float:
    """exp of the mean negative log-likelihood."""
    mean = sum(nll) / len(nll)
    return math.exp(mean) if mean < 700 else math.inf


def task_label(task: str) -> str:
    """A task's name; of a file, its name without the folder."""
    return Path(task).name


def size_text(nbytes: int) -> str:
    """MB or GB (1e6, 1e9 bytes)."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB"


def rate_text(rate: float) -> str:
    """Three digits, never an exponent: `5,280`, `31.4`, `0.512`."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def columns(rows: list[Row]) -> list[str]:
    """Every column, in the order of the fullest row."""
    return list(dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row))


def markdown_table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    heads = columns(rows)
    lines = ["| " + " | ".join(map(markdown_cell, heads)) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(markdown_cell(row.get(head, "")) for head in heads) + " |" for row in rows]
    return "\n".join(lines)


def markdown_cell(text: str) -> str:
    """Text that cannot end its cell, and is no HTML."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _speed_cells(measurement: Measurement) -> Row:
    row = measurement.first
    if row is None:
        return {}
    memory = row.memory or {}
    peak = memory.get("device") or memory.get("resident")
    cells = {"engine": measurement.engine}
    cells |= {"peak memory": f"{peak / GIB:.2f} GiB"} if peak else {}
    return cells | ({"tokens/s": rate_text(1 / row.step_seconds)} if row.step_seconds else {})


def _speed_notes(measured: Measured) -> list[str]:
    """Where and how the speeds were measured; of which models they were not."""
    shown = {name: m for name, m in one_machine(measured).items() if m.first is not None}
    if not shown:
        return []
    ways = dict.fromkeys(
        f"{m.first.context:,} tokens of prompt, {count_of(m.first.sequences, 'request')} at once, on {m.machine}"
        for m in shown.values() if m.first is not None
    )  # fmt: skip
    engines = len({m.engine for m in shown.values()})
    mixed = " Speeds of different engines compare the engines too." if engines > 1 else ""
    elsewhere = [name for name, found in measured.items() if name not in shown and any(m.first for m in found)]
    mixed += f" On another machine: {', '.join(elsewhere)}." if elsewhere else ""
    return [f"Peak memory, tokens/s (decoding, one request): {'; '.join(ways)}.{mixed}"]


def _fidelity_cells(name: str, score: FidelityScore, at: str) -> Row:
    cells = {f"perplexity{at}": f"{perplexity(score.nll):.3f}"}
    if name != "source":
        interval = mean_kl(score)
        shown = f"{interval.estimate:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
        cells[f"KL to source{at}"] = shown if math.isfinite(interval.estimate) else "not a number"
        cells[f"top-1{at}"] = f"{sum(score.top1) / len(score.top1):.1%}"
    return cells
