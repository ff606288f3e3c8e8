"""Measurements as people read them: `qtool measure`'s tables, and the rows of report and card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qtool.report.columns import print_table, wide
from qtool.report.tables import GIB, rate_text
from qtool.runs.measurements import Measurement, Row


def print_rows(rows: Sequence[Row]) -> None:
    """Speeds, memory and cost, then every row that was not believed or not run, with why."""
    for cells in (_speeds, _costs):
        if any(cells(row) for row in rows) or cells is _speeds:
            print_table(wide, [_name(row) | cells(row) for row in rows])
    for row in rows:
        if row.why:
            text = f"{row.context:,} x {row.sequences}: {row.status}: {row.why}"
            wide.print(text, highlight=False, soft_wrap=True)


def _name(row: Row) -> dict[str, str]:
    cell = {"prompt x batch": f"{row.context:,} x {row.sequences}"}
    return cell if row.status == "ok" else cell | {"status": row.status}


def _speeds(row: Row) -> dict[str, str]:
    cells: dict[str, str] = {}
    if row.first_seconds is not None:
        cells |= {f"first {name} s": f"{value:.3g}" for name, value in row.first_seconds.items()}
    if row.step_seconds is not None:
        cells["decode tok/s"] = rate_text(1 / row.step_seconds)
        if row.step_bound is not None:
            cells["at most"] = rate_text(1 / row.step_bound[0])
    if row.tokens_per_second is not None and row.requests_per_second is not None:
        cells["all tok/s"] = rate_text(row.tokens_per_second)
        cells["requests/s"] = rate_text(row.requests_per_second)
    return cells


def _costs(row: Row) -> dict[str, str]:
    cells: dict[str, str] = {}
    for name, value in (row.memory or {}).items():
        if value is not None:
            cells[f"peak {name} GiB"] = f"{value / GIB:.2f}"
    if row.predicted is not None:
        cells["predicted GiB"] = f"{row.predicted / GIB:.2f}"
    if row.cached is not None:
        cells["prefix hits"] = f"{row.cached:.0%}"
    if row.cost_per_million is not None:
        cells["cost per million"] = f"{row.cost_per_million:.3g}"
    return cells


def measured_rows(measured: Mapping[str, Sequence[Measurement]]) -> list[dict[str, str]]:
    """A row for each cell of each model, for report and card; a column that would say one thing of all is left out."""
    found = []
    several = len({measurement.machine for found in measured.values() for measurement in found}) > 1
    for name, measurements in measured.items():
        for measurement in measurements:
            about = {"model": name, "engine": measurement.engine}
            about |= {"machine": measurement.machine} if several else {}
            found += [about | _name(row) | _speeds(row) | _costs(row) for row in measurement.rows]
    return found


def measured_ways(measured: Mapping[str, Sequence[Measurement]]) -> list[str]:
    """How the rows came about, a sentence for each engine."""
    return list(dict.fromkeys(
        f"Random prompts, {m.tokens} tokens generated for each, medians of {m.repeats}, on {m.machine} ({m.engine}: "
        f"{m.version or 'unknown'})."
        for found in measured.values() for m in found if m.rows
    ))  # fmt: skip


def measured_faults(measured: Mapping[str, Sequence[Measurement]]) -> list[str]:
    """What was not measured, or not believed, and why."""
    faults = []
    for name, measurements in measured.items():
        for measurement in measurements:
            wrong = [row for row in measurement.rows if row.why]
            said = [(f", {row.context:,} x {row.sequences}", f"{row.status}: {row.why}") for row in wrong]
            said += [("", f"not measured: {measurement.why}")] if measurement.why else []
            faults += [f"{name} ({measurement.engine}){cell}: {why}" for cell, why in said]
    return faults
