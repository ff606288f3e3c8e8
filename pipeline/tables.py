"""The score table as rows of text: size, perplexity, KL, each task with its interval and its paired loss."""

from __future__ import annotations

import math
from pathlib import Path

from qtool.evaluate.rates import mean_rate, rate_difference
from qtool.evaluate.regression import Difference, bootstrap_mean, holm
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
        if name in scores.fidelity:
            row |= _fidelity_cells(name, scores)
        for task, score in scores.tasks.get(name, {}).items():
            interval = mean_rate(score.solved, score.samples)
            label = task_label(task) if score.samples == 1 else f"{task_label(task)}, pass@1 of {score.samples}"
            row[label] = f"{interval.estimate:.1%} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
            if (name, task) in compared:
                difference, p = compared[name, task]
                row[f"{label}: points lost"] = f"{points(difference)}, p={p:.2g}"
        rows.append(row)
    return rows


def points(difference: Difference) -> str:
    """`1.8 [-1.1, 4.6]`."""
    loss = difference.loss
    return f"{loss.estimate:.1f} [{loss.low:.1f}, {loss.high:.1f}]"


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
            parts.append(f"Losses from about {max(shown):.1f} points on show with 80 % power on so many problems.")
    if len(scores.fidelity) > 1:
        parts.append("KL: mean divergence from the source in nats a token.")
    return " ".join([*parts, *_caveats(scores)])


def _caveats(scores: Scores) -> list[str]:
    """What a reader must know of a task's problems before believing its rate."""
    said = []
    for task, score in {task: score for tasks in scores.tasks.values() for task, score in tasks.items()}.items():
        asked = len(score.outcomes)
        if score.left_out:
            name, reason = next(iter(score.left_out.items()))
            said.append(
                f"{task_label(task)}: {asked} of {asked + len(score.left_out)} problems; the others cannot be judged "
                f"here ({name}: {reason})."
            )
        if score.in_process:
            said.append(
                f"{task_label(task)}: {score.in_process} of {asked} programs shared a process with their test, which a "
                "program can cheat."
            )
    return said


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
    """Text that cannot end its cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def _fidelity_cells(name: str, scores: Scores) -> Row:
    score = scores.fidelity[name]
    cells = {"perplexity": f"{math.exp(sum(score.nll) / len(score.nll)):.3f}"}
    if name != "source":
        interval = bootstrap_mean(score.kl)
        cells["KL to source"] = f"{interval.estimate:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
        cells["top-1"] = f"{sum(score.top1) / len(score.top1):.1%}"
    return cells
