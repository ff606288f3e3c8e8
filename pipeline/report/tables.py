"""The score table as rows of text: size, perplexity, KL, each task with its interval and its paired loss, and what was
measured of memory and speed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qtool.evaluate.statistics import Interval
from qtool.runs.evidence import p_number, points, size_text, task_label
from qtool.runs.informative import WORD, of_task
from qtool.runs.measurements import Measurement, one_machine
from qtool.runs.summary import Summary, TaskSummary, TextSummary

GIB = 2**30
Row = dict[str, str]
Measured = Mapping[str, list[Measurement]]  # subject -> its measurements, the newest first


def score_rows(summary: Summary) -> list[Row]:
    """One row for each model; a cell nobody measured is left out."""
    speeds = one_machine(summary.measured)
    rows = []
    for name, model in summary.models.items():
        row = {"model": name}
        if model.size is not None:
            row |= {"size": size_text(model.size.tensors), "bits": f"{model.size.bits_per_weight:.2f} bpw"}
        for length, text in model.texts.items():
            row |= _text_cells(name, text, "" if text is model.text else f", {length} tokens")
        for task, found in model.tasks.items():
            row |= _task_cells(task_label(task), found, of_task(summary, task))
        rows.append(row | (_speed_cells(speeds[name]) if name in speeds else {}))
    return rows


def by_task(rows: list[Row], summary: Summary, most: int) -> list[list[Row]]:
    """The score table; of more columns than ``most`` a table for what is of no task, and one for each task."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    if len(heads) <= most:
        return [rows]
    owners = dict.fromkeys(heads, "")
    for label in dict.fromkeys(task_label(task) for model in summary.models.values() for task in model.tasks):
        owners |= {head: label for head in heads if head == label or head.startswith((f"{label}:", f"{label}, "))}
    parts = []
    for owner in dict.fromkeys(owners.values()):
        part = [{head: said for head, said in row.items() if owners[head] == owner or head == "model"} for row in rows]
        parts.append([row for row in part if len(row) > 1])
    return parts


def _task_cells(name: str, task: TaskSummary, uninformative: str) -> Row:
    label = name if task.samples == 1 else f"{name}, pass@1 of {task.samples}"
    row = {label: _percent(task.rate)}
    row |= {f"{name}, pass@{k}": _percent(several) for k, several in task.pass_at.items() if k > 1}
    if (loss := task.loss) is not None:
        lost = f"{points(loss.difference.loss)}, {p_number(loss.p_holm)}"
        row[f"{label}: points lost"] = WORD if uninformative else lost
        if loss.recovery is not None and not uninformative:
            row[f"{label}: recovery"] = _percent(loss.recovery)
    return row


def _percent(interval: Interval) -> str:
    return f"{interval.estimate:.1%} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def footnote(summary: Summary) -> str:
    """What brackets, p and the measured columns mean in this table."""
    models = summary.models.values()
    tasks = [task for model in models for task in model.tasks.values()]
    telling = [task for m in models for label, task in m.tasks.items() if not of_task(summary, label)]
    bracketed = bool(tasks) or sum(bool(model.texts) for model in models) > 1
    parts = ["Brackets: 95 % intervals."] if bracketed else []
    if compared := [task.loss for task in telling if task.loss is not None]:
        test = "paired permutation test" if any(task.samples > 1 for task in tasks) else "McNemar test"
        among = summary.comparisons
        many = f", Holm-adjusted over the {among} comparisons of the run" if among > 1 else ""
        parts.append(f"p: exact {test} against the source{many}.")
        shown = [loss.difference.detectable for loss in compared if loss.difference.detectable is not None]
        if shown:
            parts.append(f"Losses of about {max(shown):.1f} points and more would show (80 % power).")
    if sum(bool(model.texts) for model in summary.models.values()) > 1:
        parts.append("KL: mean divergence from the source in nats a token.")
    if compared:
        parts.append("Recovery: score in % of the source's, with the paired loss's interval.")
    return " ".join([*parts, *_speed_notes(summary.measured), *caveats(summary)])


def caveats(summary: Summary) -> list[str]:
    """What a score does not cover, or could not exclude; one sentence each."""
    told = {task: of_task(summary, task) for task in summary.tasks}
    said = [f"{task_label(task)} is {why}: it cannot show a loss." for task, why in told.items() if why]
    for task, found in next((model.tasks for model in summary.models.values() if model.tasks), {}).items():
        if found.left_out:
            missing = count_of(len(found.left_out), "problem")
            said.append(f"{task_label(task)}: {missing} of the benchmark could not be asked here.")
        if found.in_process:
            many = f"{found.in_process} of {len(found.solved)} programs"
            said.append(f"{task_label(task)}: {many} shared a process with their test and could have forged a pass.")
        if found.sandbox == "none":
            said.append(f"{task_label(task)}: the programs ran without a sandbox.")
    return said


def count_of(number: int, noun: str) -> str:
    """`1 problem`, `2 problems`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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


def _text_cells(name: str, text: TextSummary, at: str) -> Row:
    cells = {f"perplexity{at}": f"{text.perplexity.estimate:.3f}"}
    if name != "source":
        shown = f"{text.kl.estimate:.4f}"
        if math.isfinite(text.kl.low) and math.isfinite(text.kl.high):  # one window alone has no interval
            shown += f" [{text.kl.low:.4f}, {text.kl.high:.4f}]"
        cells[f"KL to source{at}"] = shown if math.isfinite(text.kl.estimate) else "not a number"
        cells[f"top-1{at}"] = f"{text.top1:.1%}"
    return cells
