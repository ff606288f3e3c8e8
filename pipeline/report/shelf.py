"""`qtool runs` in the terminal: a row for each run, or one in detail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from qtool.report.columns import console, print_list, print_table
from qtool.report.tables import Row
from qtool.runs.evidence import size_text, spent_text
from qtool.runs.record import RECIPE, RESULT, load_run
from qtool.runs.shelf import Entry

SHORT = 8  # characters of an id: enough to tell runs apart, and to name one
WIDE = 22  # of a model's name


def print_entries(found: Sequence[Entry], there: int, runs: Path) -> None:
    """A row each; what to do where there is none."""
    if not found:
        none = (
            f"{runs} has no run of that kind, of {there}."
            if there
            else f"{runs} has no run: `qtool run demo` makes one."
        )
        console.print(none, highlight=False, soft_wrap=True)
        return
    print_table(console, [_row(entry) for entry in found], left=("name", "model", "outputs", "result"))


def _row(entry: Entry) -> Row:
    outputs = ", ".join(entry.models)
    return {
        "run": entry.id[:SHORT], "name": entry.name, "model": _cut(entry.model), "outputs": _cut(outputs),
        "finished": "" if entry.finished is None else entry.finished.strftime("%m-%d %H:%M"), "result": entry.state,
    }  # fmt: skip


def _cut(text: str) -> str:
    return text if len(text) <= WIDE else f"{text[: WIDE - 1]}…"


def print_entry(entry: Entry) -> None:
    """What the run's folder tells."""
    told = [("run", entry.id), ("name", entry.name), ("result", entry.state), ("folder", str(entry.folder))]
    if (entry.folder / RESULT).is_file() and (entry.folder / RECIPE).is_file():
        run = load_run(entry.folder)
        told += [("model", run.lock.source.model), ("commit", run.lock.source.commit), ("device", run.lock.device)]
        told += [(f"set {path}", str(value)) for path, value in run.lock.overrides.items()]
        told += [("took", spent_text(run.seconds, run.stages, run.peaks)), ("finished", run.finished)]
        for name, manifest in run.manifests.items():
            place = run.folders.get(name)
            where = str(place) if place else "is no longer where it was"
            told.append((name, f"{size_text(manifest.file_bytes)}, {manifest.bits_per_weight:.2f} bpw: {where}"))
        told += [(v.output, f"{v.verdict}: {v.gate}: {v.reason}") for v in run.verdicts]
        told.append(("report", str(entry.folder / "report.html")))
    elif entry.state == "not finished":
        told.append(("go on", f"qtool run {entry.folder / RECIPE}"))
    else:
        told.append(("models", ", ".join(entry.models)))
    print_list([(escape(what), said) for what, said in told if said])
