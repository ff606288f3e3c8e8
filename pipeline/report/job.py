"""A job before it begins: what each linear becomes (`qtool run --dry-run`), what the work takes (`qtool plan
RECIPE`)."""

from __future__ import annotations

from rich.table import Table

from qtool.convert.models.expert_names import stacked
from qtool.make.job import Job
from qtool.make.needs import Resources, peak_of
from qtool.report.columns import console


def print_plan(job: Job, cards: int = 1) -> None:
    """`--dry-run`: what each linear becomes, then totals, memory (of one of ``cards``) and disk."""
    for note in job.remarks:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    for output in job.outputs:
        title, plan = output.name, output.plan
        table = Table(title=f"{job.source.name} -> {title}", title_justify="left")
        grouped = "type" if any(linear.type for linear in plan.linears) else "group size"
        for column in ("linear", "of them", "shape [out, in]", grouped, "bytes each"):
            table.add_column(column, justify="left" if column == "linear" else "right")
        kinds: dict[tuple[str, int, int, str, int], int] = {}
        for linear in plan.linears:
            name = stacked(linear.name)  # a row for all experts that are alike: there may be 128
            part = name[len(job.decoder.prefix) :].split(".", 1)[1]
            key = (part, linear.out, linear.columns, linear.type or str(linear.group_size), linear.nbytes)
            kinds[key] = kinds.get(key, 0) + 1
        for (part, out, across, group, nbytes), count in kinds.items():
            table.add_row(part, str(count), f"[{out}, {across}]", group, f"{nbytes:,}")
        console.print(table)
        for note in output.notes:
            console.print(f"{title}: {note}", highlight=False, soft_wrap=True)
        console.print(
            f"{title}: {plan.nbytes / 1e9:.3f} GB ({plan.nbytes / 2**30:.3f} GiB), {plan.bits_per_weight:.3f} bpw over "
            f"{plan.parameters:,} parameters; disk {plan.nbytes / 1e9:.3f} GB",
            highlight=False,
        )
    memory = peak_of(job, job.outputs, cards)
    where = job.device.type if cards == 1 else f"each of {cards} cards, at most"
    console.print(f"peak memory of the conversion on {where}: about {memory / 2**30:.2f} GiB", highlight=False)


def print_needs(needs: Resources) -> None:
    """A line for each resource, then what is short."""
    short = needs.short()
    console.print("[red]cannot finish here[/]" if short else "[green]this job fits[/]")
    rows = [("host memory", needs.host_bytes, needs.host_free), (f"disk at {needs.disk_path}", needs.disk_bytes,
            needs.disk_free)]  # fmt: skip
    if needs.device != "host":
        rows.insert(0, (f"{needs.device} memory", needs.device_bytes, needs.device_free))
    for what, need, free in rows:
        there = "" if free is None else f", {free / 1e9:.2f} GB free"
        console.print(f"{what}: {need / 1e9:.2f} GB{there}", highlight=False, soft_wrap=True)
    if needs.seconds is None:
        console.print("time: not known; no earlier run on this kind of machine is in the ledger", highlight=False)
    else:
        low, high = needs.seconds
        console.print(f"time: {low:.0f} to {high:.0f} s, as earlier runs on this kind of machine took", highlight=False)
    for line in short:
        console.print(f"short of {line}", highlight=False, soft_wrap=True)
