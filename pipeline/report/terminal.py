"""What a person reads: plan, checks, score table and verdicts in the terminal, and the files of `qtool report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qtool.convert.formats.gguf.plan import GgufPlan
from qtool.convert.runtimes import vllm as vllm_rules
from qtool.convert.verify.checks import Verification
from qtool.measure.report import measured_faults
from qtool.report import loading
from qtool.report.columns import print_table
from qtool.report.html import html_report
from qtool.report.markdown import markdown_report
from qtool.report.pictures import pictures
from qtool.report.tables import Row, footnote, score_rows

if TYPE_CHECKING:
    from qtool.evaluate.selfcheck import SelfCheck
    from qtool.make.job import Job
    from qtool.runs.compare import Change
    from qtool.runs.gates import GateResult
    from qtool.runs.record import RunRecord
    from qtool.runs.summary import Summary

console = Console()
MARKS = {
    "pass": "[green]pass[/]",
    "fail": "[red]FAIL[/]",
    "FAIL": "[red]FAIL[/]",
    "no": "[yellow]no[/]",
    "undecided": "[yellow]undecided[/]",
    "not made": "[dim]not made[/]",
}
SHOWN = {"worse": "[red]WORSE[/]", "better": "[green]better[/]", "not judged": ""}


def print_run(run: RunRecord) -> None:
    """The end of `qtool run`: table, checks, verdicts, where the log is; the reports beside the log."""
    rows = score_rows(run.summary)
    print_rows(rows, f"{run.lock.source.name} · {run.lock.recipe[:8]}")
    _print_footnote(footnote(run.summary))
    for note in measured_faults(run.summary.measured):
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    for name, checked in run.checks.items():
        _print_summary(name, checked)
        for note in run.manifests[name].notes:
            console.print(f"  {note}", highlight=False, soft_wrap=True)
    print_results(run.verdicts)
    for name, artifact in run.artifacts.items():
        console.print(f"{name}: {artifact.path}", highlight=False, soft_wrap=True)
    console.print(f"report: {write_report(run, run.folder)}", highlight=False, soft_wrap=True)


def print_rows(rows: list[Row], title: str = "") -> None:
    """The score table."""
    print_table(console, rows, title)


def write_report(run: RunRecord, out: Path) -> Path:
    """report.html, report.md and figures/*.svg in ``out``; the path of the HTML file."""
    drawn = pictures(run)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for picture in drawn:
        (out / "figures" / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
    (out / "report.md").write_text(markdown_report(run, drawn), encoding="utf-8")
    path = out / "report.html"
    path.write_text(html_report(run, drawn), encoding="utf-8")
    return path


def print_scores(summary: Summary) -> None:
    """`qtool evaluate`'s table."""
    print_rows(score_rows(summary))
    _print_footnote(footnote(summary))


def _print_footnote(text: str) -> None:
    if text:
        console.print(text, highlight=False, markup=False)


def print_self_check(checks: dict[str, SelfCheck]) -> None:
    """`qtool evaluate --self-check`. Raises QtoolError (exit 3) when known answers were judged wrongly."""
    for label, found in checks.items():
        judged = f"{found.right} published solutions passed, {found.wrong} wrong answers failed"
        if found.faults:
            judged = f"[red]{len(found.faults)} known answers judged wrongly[/] of {found.right + found.wrong}"
        unchecked = f"; {len(found.unchecked)} not checked (no published solution)" if found.unchecked else ""
        console.print(f"{label}: {judged}{unchecked}; sandbox: {found.sandbox}", highlight=False, soft_wrap=True)
    for found in checks.values():
        found.require()


def print_results(results: Sequence[GateResult]) -> None:
    """One line a gate, with its reason."""
    for found in results:
        line = f"{MARKS[found.verdict]}  {escape(f'{found.output}: {found.gate}: {found.reason}')}"
        console.print(line, highlight=False, soft_wrap=True)


def print_changes(changes: Sequence[Change], notes: Sequence[str]) -> None:
    """`qtool compare`: a line a measurement, then the answer."""
    for change in changes:
        p = "" if change.p is None else f", p={change.p:.2g}"
        said = escape(f"{change.model}: {change.what}: {change.before} -> {change.after}: {change.change}{p}")
        mark = SHOWN.get(change.shown, change.shown)
        console.print(f"{mark}  {said}" if mark else said, highlight=False, soft_wrap=True)
    console.print("\n".join(map(escape, notes)), end="\n" if notes else "")
    worse = [change for change in changes if change.shown == "worse"]
    tests = sum(change.p is not None for change in changes)
    if tests > 1:
        console.print(f"p is Holm-adjusted over {tests} tests; brackets are 95 % intervals.", highlight=False)
    found = ", ".join(f"{change.model} on {change.what}" for change in worse)
    console.print(f"[red]B is worse[/]: {escape(found)}" if worse else "No loss from A to B is shown.", highlight=False)


def print_verification(result: Verification) -> None:
    """Every check of `qtool verify`."""
    table = Table(title=str(result.path), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("check", "result", "detail"):
        table.add_column(column, overflow="fold")
    for line in loading.lines(result.checks):
        table.add_row(escape(line.name), MARKS[line.result], escape(line.detail))
    console.print(table)
    console.print("sound" if result.sound else "[red]NOT sound[/]: a required check failed")
    if loads := loading.what_loads_it(result.checks):
        console.print(loads, highlight=False, soft_wrap=True, markup=False)


def _print_summary(name: str, result: Verification) -> None:
    state = "verified" if result.sound else f"[red]NOT sound[/] (`qtool verify {escape(str(result.path))}` says why)"
    loads = loading.what_loads_it(result.checks)
    said = escape(f"; by the rules it {loads}" if loads.startswith("loads") else f"; {loads}" if loads else "")
    console.print(f"{name}: {state}{said}", highlight=False, soft_wrap=True)


def plan_notes(job: Job, name: str) -> list[str]:
    """What is to be said of an output before it is made: fallback types, what vLLM refuses or needs."""
    plan = job.plans[name]
    if isinstance(plan, GgufPlan):
        return plan.notes
    (method,) = (output for output in job.recipe.outputs if output.name == name)
    return vllm_rules.notes(method.quantization_config())


def print_plan(job: Job) -> None:
    """`--dry-run`: what each linear becomes, then totals, memory and disk."""
    from qtool.make.needs import peak_of

    for note in job.remarks:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    for name, plan in job.plans.items():
        table = Table(title=f"{job.source.name} -> {name}", title_justify="left")
        grouped = "type" if isinstance(plan, GgufPlan) else "group size"
        for column in ("linear", "layers", "shape [out, in]", grouped, "bytes each"):
            table.add_column(column, justify="left" if column == "linear" else "right")
        kinds: dict[tuple[str, int, int, str, int], int] = {}
        for linear in plan.linears:
            kind = linear.name[len(job.decoder.prefix) :].split(".", 1)[1]
            key = (kind, linear.out, linear.columns, linear.type or str(linear.group_size), linear.nbytes)
            kinds[key] = kinds.get(key, 0) + 1
        for (kind, out, across, group, nbytes), count in kinds.items():
            table.add_row(kind, str(count), f"[{out}, {across}]", group, f"{nbytes:,}")
        console.print(table)
        for note in plan_notes(job, name):
            console.print(f"{name}: {note}", highlight=False, soft_wrap=True)
        console.print(
            f"{name}: {plan.nbytes / 1e9:.3f} GB ({plan.nbytes / 2**30:.3f} GiB), {plan.bits_per_weight:.3f} bpw over "
            f"{plan.parameters:,} parameters; disk {plan.nbytes / 1e9:.3f} GB",
            highlight=False,
        )
    recipe = job.recipe
    methods = [method for method in recipe.outputs if method.name in job.plans]
    memory = peak_of(job, methods)
    console.print(
        f"peak memory of the conversion on {job.device.type}: about {memory / 2**30:.2f} GiB", highlight=False
    )
