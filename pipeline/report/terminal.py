"""What a person reads in the terminal: checks, score table and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from qtool.convert.verify.verification import Verification
from qtool.report import loading
from qtool.report.along import TITLE, along_note, along_rows
from qtool.report.columns import console, print_table, say, show
from qtool.report.depths import NOTE, depth_rows
from qtool.report.depths import TITLE as DEPTHS
from qtool.report.measured import measured_faults
from qtool.report.served import proof_line
from qtool.report.tables import Row, footnote, score_rows
from qtool.runs.evidence import p_number, spent_text

if TYPE_CHECKING:
    from qtool.evaluate.selfcheck import SelfCheck
    from qtool.runs.compare import Change
    from qtool.runs.gates import GateResult
    from qtool.runs.record import RunRecord
    from qtool.runs.summary import Summary

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
    """The end of `qtool run`: table, checks, verdicts, where the artifacts are."""
    rows = score_rows(run.summary)
    print_rows(rows, f"{run.lock.source.name} · {run.lock.recipe[:8]}")
    _print_footnote(footnote(run.summary))
    _print_long(run.summary)
    for note in measured_faults(run.summary.measured):
        say(escape(note))
    for name, checked in run.checks.items():
        _print_summary(name, checked)
        for note in run.manifests[name].notes:
            say(f"  {escape(note)}", 4)
    for name, found in run.summary.proofs.items():
        for proof in found:
            say(escape(f"{name}: {proof_line(proof)}"))
    print_results(run.verdicts)
    say(escape(spent_text(run.seconds, run.stages, run.peaks)))
    for name, folder in run.folders.items():
        console.print(f"{name}: {folder}", highlight=False, soft_wrap=True)


def print_rows(rows: list[Row], title: str = "") -> None:
    """The score table."""
    print_table(console, rows, title)


def print_scores(summary: Summary) -> None:
    """`qtool evaluate`'s table."""
    print_rows(score_rows(summary))
    _print_footnote(footnote(summary))
    _print_long(summary)


def _print_long(summary: Summary) -> None:
    if rows := depth_rows(summary):
        print_table(console, rows, DEPTHS, lead=3)
        _print_footnote(NOTE)
    if rows := along_rows(summary):
        print_table(console, rows, TITLE, lead=2, left=("cache",))
        _print_footnote(along_note(summary))


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
    for result in results:
        line = f"{MARKS[result.verdict]}  {escape(f'{result.output}: {result.gate}: {result.reason}')}"
        say(line, 6)


def print_changes(changes: Sequence[Change], notes: Sequence[str]) -> None:
    """`qtool compare`: a line a measurement, then the answer."""
    for change in changes:
        p = "" if change.p is None else f", {p_number(change.p)}"
        sides = f"{change.before} -> {change.after}: " if change.numbers else ""  # None: one side alone
        said = escape(f"{change.model}: {change.what}: {sides}{change.change}{p}")
        mark = SHOWN.get(change.shown, change.shown)
        say(f"{mark}  {said}" if mark else said)
    console.print("\n".join(map(escape, notes)), end="\n" if notes else "")
    worse = [change for change in changes if change.shown == "worse"]
    tests = sum(change.p is not None for change in changes)
    if tests > 1:
        console.print(f"p is Holm-adjusted over {tests} tests; brackets are 95 % intervals.", highlight=False)
    found = ", ".join(f"{change.model} on {change.what}" for change in worse)
    told = any(change.shown in ("better", "no loss shown") for change in changes)
    none = "No loss from A to B is shown." if told else "Nothing here can show a loss: no measurement that tells."
    console.print(f"[red]B is worse[/]: {escape(found)}" if worse else none, highlight=False)


def print_verification(result: Verification) -> None:
    """Every check of `qtool verify`."""
    table = Table(title=str(result.path), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("check", "result", "detail"):
        table.add_column(column, overflow="fold")
    for line in loading.lines(result.checks):
        table.add_row(escape(line.name), MARKS[line.result], escape(line.detail))
    show(table, console)
    console.print("sound" if result.sound else "[red]NOT sound[/]: a required check failed")
    if result.sound and (loads := loading.what_loads_it(result.checks)):
        say(escape(loads))


def _print_summary(name: str, result: Verification) -> None:
    state = "verified" if result.sound else f"[red]NOT sound[/] (`qtool verify {escape(str(result.path))}` says why)"
    loads = loading.what_loads_it(result.checks) if result.sound else ""
    said = escape(f"; by the rules it {loads}" if loads.startswith("loads") else f"; {loads}" if loads else "")
    say(f"{name}: {state}{said}")
