"""The score table as rows of text: size, perplexity, KL, each task with its interval and its paired loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from qtool.evaluate.rates import mean_rate, rate_difference
from qtool.evaluate.regression import Difference, Interval, bootstrap_mean, holm
from qtool.evaluate.scorecard import FidelityScore, pass_at_k
from qtool.record import Sizes
from qtool.scores import Scores

Row = dict[str, str]


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


def score_rows(scores: Scores, known: Sizes) -> list[Row]:
    """One row for each subject; a cell nobody measured is left out."""
    compared = losses(scores)
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
        rows.append(row)
    return rows


def points(difference: Difference) -> str:
    """`1.8 [-1.1, 4.6]`; never -0.0."""
    loss = difference.loss
    estimate, low, high = (round(x, 1) + 0.0 for x in (loss.estimate, loss.low, loss.high))
    return f"{estimate:.1f} [{low:.1f}, {high:.1f}]"


def footnote(scores: Scores) -> str:
    """What brackets and p mean in this table."""
    parts = ["Brackets: 95 % intervals."]
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
    return " ".join([*parts, *caveats(scores)])


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


def _fidelity_cells(name: str, score: FidelityScore, at: str) -> Row:
    cells = {f"perplexity{at}": f"{perplexity(score.nll):.3f}"}
    if name != "source":
        interval = mean_kl(score)
        shown = f"{interval.estimate:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
        cells[f"KL to source{at}"] = shown if math.isfinite(interval.estimate) else "not a number"
        cells[f"top-1{at}"] = f"{sum(score.top1) / len(score.top1):.1%}"
    return cells
