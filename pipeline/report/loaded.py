"""A load as people read it: a row for each level, then what keeps the objective and what failed."""

from __future__ import annotations

from collections.abc import Mapping

from qtool.report.columns import print_table, wide
from qtool.report.markup import spelt
from qtool.report.tables import rate_text
from qtool.runs.loads import Level, Load, Slo


def print_load(load: Load) -> None:
    """Table, verdict, faults."""
    shared = f", the first {load.shared:,} of them shared" if load.shared else ", nothing shared"
    wide.print(f"{spelt(load.model)} at {load.url} ({load.engine}): {load.prompt:,} tokens a prompt{shared}; "
               f"{load.tokens} answered", highlight=False, soft_wrap=True, markup=False)  # fmt: skip
    print_table(wide, [row_of(level) for level in load.levels])
    for text in sentences(load):
        wide.print(text, highlight=False, soft_wrap=True, markup=False)


def row_of(level: Level) -> dict[str, str]:
    """Milliseconds; `failed` where a failed request lies at that percentile."""
    row = {"load": level.name, "requests": str(level.requests), "failed": str(level.failed or "")}
    row |= {f"first {name} ms": _ms(level.first, name) for name in ("p50", "p95")}
    row |= {f"step {name} ms": _ms(level.step, name) for name in ("p50", "p95")}
    row["whole p95 ms"] = _ms(level.whole, "p95")
    if level.step_bound is not None:
        best, slow = level.step_bound
        row["planned step"] = f"{1e3 * best:.3g} - {'?' if slow is None else f'{1e3 * slow:.3g}'}"
    row |= {"tok/s": rate_text(level.tokens_per_second), "in flight": f"{level.in_flight:.1f}"}
    if level.hits is not None:
        row["prefix hits"] = f"{level.hits:.0%}"
    if level.preempted is not None:
        row["preempted"] = f"{level.preempted:.0f}"
    if level.keeps is not None:
        row |= {"good/s": rate_text(level.good), "p95 kept": "yes" if level.keeps else "no"}
    return row


def sentences(load: Load) -> list[str]:
    """What follows from the rows."""
    said = []
    if load.slo != Slo():
        closed = [level for level in load.levels if level.users is not None]
        if closed:
            best = load.largest
            most = best.name if best else "not even the fewest users"
            said.append(f"{_objective(load.slo)}: p95 is kept with {most}.")
        opened = [level.rate for level in load.levels if level.rate is not None and level.keeps]
        if any(level.rate is not None for level in load.levels):
            said.append(
                f"{_objective(load.slo)}: p95 is kept at {f'{max(opened):g} requests/s' if opened else 'no rate'}."
            )
    for level in load.levels:
        if level.wrong:
            said.append(f"{level.name}: not believed: {level.wrong}")
        said += [f"{level.name}: {count} failed: {why}" for why, count in level.faults.items()]
        if level.rate is not None and level.late > 0.05:
            said.append(
                f"{level.name}: requests were sent up to {level.late:.2f} s late (p95); that counts as latency."
            )
    return said


def _objective(slo: Slo) -> str:
    parts = [f"first token within {1e3 * slo.first:g} ms"] if slo.first is not None else []
    parts += [f"each further within {1e3 * slo.step:g} ms"] if slo.step is not None else []
    return ", ".join(parts)


def _ms(found: Mapping[str, float | None], name: str) -> str:
    if name not in found:
        return ""
    value = found[name]
    return "failed" if value is None else f"{1e3 * value:.3g}"
