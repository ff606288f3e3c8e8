"""A run as Markdown, for a model card or a pull request; its pictures are files beside it."""

from __future__ import annotations

import re

from qtool.report import loading
from qtool.report.along import TITLE, along_note, along_rows
from qtool.report.measured import measured_faults, measured_rows, measured_ways
from qtool.report.pictures import Picture, cost_lines, verdict_of
from qtool.report.served import PROVED, proof_rows, proof_ways
from qtool.report.tables import Measured, footnote, markdown_cell, markdown_table, score_rows
from qtool.runs.coverage import coverage
from qtool.runs.evidence import spent_text, task_label
from qtool.runs.record import RunRecord


def markdown_report(run: RunRecord, drawn: list[Picture], folder: str = "figures") -> str:
    """Verdict, table, pictures, outcomes that changed, worst linears, checks, recipe, versions."""
    source = run.lock.source
    parts = [f"# {source.name}: what quantization cost", f"**{verdict_of(run)[1]}.** Source commit `{source.commit}`."]
    if run.verdicts:
        parts.append("\n".join(f"- **{v.verdict}** {v.output}: {v.gate}: {v.reason}" for v in run.verdicts))
    parts += [markdown_table(score_rows(run.summary)), footnote(run.summary)]
    parts.append("\n".join(f"- **{name}**: {said}" for name, said in cost_lines(run)))
    parts += [f"![{picture.title}]({folder}/{picture.name}.svg)\n\n{picture.caption}" for picture in drawn]
    if rows := along_rows(run.summary):
        parts += [f"## {TITLE}", markdown_table(rows), along_note(run.summary)]
    parts += measured_markdown(run.summary.measured)
    if rows := proof_rows(run.summary.proofs):
        parts += ["## In real servers", PROVED, markdown_table(rows), " ".join(proof_ways(run.summary.proofs))]
    parts += _changes(run)
    for name, manifest in run.manifests.items():
        measured = [item for item in manifest.ledger.items() if "error" in item[1]]
        if measured:  # NF4 is made without inputs, so nobody knows its output errors
            worst = sorted(measured, key=lambda item: -item[1]["error"])[:10]
            lines = ["| linear | output error, round to nearest | output error, this artifact |", "|---|---|---|"]
            lines += [f"| {linear} | {r['rtn_error']:.4f} | {r['error']:.4f} |" for linear, r in worst]
            parts.append(f"## {name}: the ten linears with the largest relative output error\n\n" + "\n".join(lines))
        if reached := coverage(manifest.ledger):
            parts.append(f"## {name}: what the experts saw\n\n{reached.sentence}")
    for name, checked in run.checks.items():
        lines = [f"- {note}" for note in run.manifests[name].notes]
        lines += [f"- {line.result}: {line.name}: {line.detail}" for line in loading.lines(checked.checks)]
        parts.append(f"## {name}: checks\n\n" + "\n".join(lines))
    text = run.recipe_text.strip()
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    parts.append(f"## Recipe\n\n{fence}yaml\n{text}\n{fence}")
    parts.append(f"## Time and memory\n\n{spent_text(run.seconds, run.stages, run.peaks)}")
    parts.append("## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in run.lock.versions.items()))
    return "\n\n".join(parts) + "\n"


def measured_markdown(measured: Measured) -> list[str]:
    """The section on memory and speed; empty where nothing was measured."""
    rows = measured_rows(measured)
    parts = [markdown_table(rows), " ".join(measured_ways(measured))] if rows else []
    parts += ["\n".join(f"- {markdown_cell(fault)}" for fault in measured_faults(measured))]
    parts = [part for part in parts if part]
    return ["## Memory and speed", *parts] if parts else []


def _changes(run: RunRecord) -> list[str]:
    """Which problems each artifact lost and gained."""
    models = run.summary.models
    source = models["source"].tasks
    lines = []
    for name, model in models.items():
        for task in [task for task in model.tasks if name != "source" and task in source]:
            pairs = zip(model.tasks[task].solved.items(), source[task].solved.values(), strict=True)
            moved = [(problem, after - before) for (problem, after), before in pairs if after != before]
            lost, gained = ([markdown_cell(p) for p, change in moved if change * sign > 0] for sign in (-1, 1))
            lines.append(f"| {name} | {task_label(task)} | {_few(lost)} | {_few(gained)} |")
    head = "| model | task | lost | gained |\n|---|---|---|---|\n"
    return ["## Problems whose outcome changed\n\n" + head + "\n".join(lines)] if lines else []


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"{len(names)}: {', '.join(names[:12])}{more}" if names else "0"
