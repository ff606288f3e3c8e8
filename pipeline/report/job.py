"""A job before it begins: what each linear becomes (`qtool run --dry-run`), what the work takes (`qtool plan
RECIPE`)."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.markup import escape
from rich.table import Table

from qtool.convert.models.expert_names import stacked
from qtool.make.job import Job
from qtool.make.mixes import more
from qtool.make.needs import Resources
from qtool.make.output import Output
from qtool.report.columns import console, print_table, say, show
from qtool.report.tables import Row
from qtool.runs.evidence import size_text


def print_plan(job: Job, needs: Resources, full: bool) -> None:
    """`--dry-run`: a row for each output (``full``: for each kind of linear, too), then what the work takes."""
    for note in job.remarks:
        say(escape(note))
    for output in job.outputs if full else ():
        show(_linears(job, output), console)
    rows, name = [_row(output) for output in job.outputs], job.source.name
    print_table(
        console,
        rows,
        f"{name} -> {job.recipe.output_dir}/{name}-OUTPUT",
        left=("groups of, or types",),
    )
    for output in job.outputs:
        for note in output.notes:
            say(escape(f"{output.name}: {note}"))
        if output.chosen is not None:
            say(escape(f"{output.name}: {more(output.chosen)}"))
    print_needs(needs)
    if not full:
        console.print("--full: what becomes of every linear.", style="dim")


def _row(output: Output) -> Row:
    """Size, bits, how many linears, in which groups or types."""
    plan = output.plan
    plain = f", {len(plan.plain)} in 16 bits" if plan.plain else ""
    kinds = dict.fromkeys(linear.type or str(linear.group_size) for linear in plan.linears)
    return {
        "output": output.name, "size": size_text(plan.nbytes), "bits a weight": f"{plan.bits_per_weight:.2f}",
        "linears": f"{len(plan.linears)}{plain}", "groups of, or types": ", ".join(kinds)
    }  # fmt: skip


def _linears(job: Job, output: Output) -> Table:
    """A row for each kind of linear: how many, shape, group or type, bytes."""
    plan = output.plan
    title = f"{output.name}: {plan.nbytes:,} bytes, {plan.bits_per_weight:.3f} bpw over {plan.parameters:,} parameters"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
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
    return table


def print_budgets(job: Job) -> None:
    """Of outputs whose types are chosen for a budget: how many matrices have each type, as far as that is known, and
    what a larger file would buy."""
    for output in job.outputs:
        if output.chosen is None and output.method.undecided is None:
            continue
        kinds = Counter(output.types.values())
        say(escape(f"{output.name}: {output.notes[-1]}"))
        say(escape(f"{output.name}: {', '.join(f'{count} matrices {kind}' for kind, count in sorted(kinds.items()))}"))
        if output.chosen is not None:
            say(escape(f"{output.name}: {more(output.chosen)}"))


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
        console.print(f"{what}: about {need / 1e9:.2f} GB{there}", highlight=False, soft_wrap=True)
    if needs.seconds is None:
        console.print(
            "time: not known; the ledger has no run of this text and tasks on such hardware",
            highlight=False,
        )
    else:
        low, high = needs.seconds
        took = f"{low:.0f} to {high:.0f} s" if round(low) != round(high) else f"about {low:.0f} s"
        console.print(f"time: {took}, as earlier runs of this text and tasks on such hardware", highlight=False)
    if needs.long is not None:
        tokens, nbytes = needs.long
        said = f"long text: {tokens:,} tokens a layer at a time, about {nbytes / 1e9:.2f} GB of the device"
        console.print(said, highlight=False, soft_wrap=True)
    for condition, nbytes in needs.caches.items():
        console.print(f"cache, {condition}: {nbytes / 1e9:.3f} GB a sequence", highlight=False, soft_wrap=True)
    for line in short:
        console.print(f"short of {line}", highlight=False, soft_wrap=True)
