"""What a person reads: the plan, the checks, the score table, the verdicts; in the terminal and as Markdown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from qtool.convert.gguf_plan import GgufPlan
from qtool.convert.verify import Verification
from qtool.evaluate.regression import bootstrap_mean, paired_difference, wilson

if TYPE_CHECKING:
    from qtool.job import Job
    from qtool.record import RunRecord, Sizes
    from qtool.scores import Scores

console = Console()
MARKS = {
    "pass": "[green]pass[/]",
    "fail": "[red]FAIL[/]",
    "undecided": "[yellow]undecided[/]",
    "not made": "[dim]not made[/]",
}


def print_run(run: RunRecord) -> None:
    """The end of `qtool run`: table, checks, verdicts, where the log is; report.md beside the log."""
    rows = score_rows(run.scores, run.sizes)
    console.print(table_of(rows, title=f"{run.lock.source.name} · {run.lock.recipe[:8]}"))
    for name, checked in run.checks.items():
        _print_summary(name, checked)
        for note in run.manifests[name].notes:
            console.print(f"  {note}", highlight=False, soft_wrap=True)
    for verdict in run.verdicts:
        console.print(f"{MARKS[verdict.verdict]}  {verdict.output}: {verdict.gate}: {verdict.reason}", highlight=False)
    for name, artifact in run.artifacts.items():
        console.print(f"{name}: {artifact.path}", highlight=False, soft_wrap=True)
    path = run.folder / "report.md"
    path.write_text(markdown(run, rows), encoding="utf-8")
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


def score_rows(scores: Scores, known: Sizes) -> list[dict[str, str]]:
    """One row for each subject: size, perplexity, KL, and each task with its interval and its paired loss."""
    names = list(dict.fromkeys([*known, *scores.fidelity, *scores.tasks]))
    rows = []
    for name in names:
        row = {"model": name}
        if name in known:
            nbytes, bpw = known[name]
            row |= {
                "size": f"{nbytes / 1e6:.1f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB",
                "bits": f"{bpw:.2f} bpw",
            }
        if name in scores.fidelity:
            row |= _fidelity_cells(name, scores)
        for task, score in scores.tasks.get(name, {}).items():
            passed = score.passed
            interval = wilson(sum(passed), len(passed))
            label = Path(task).name
            row[label] = f"{interval.estimate:.1%} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
            source = scores.tasks.get("source", {}).get(task)
            if source is not None and name != "source":
                difference = paired_difference(source.passed, passed)
                loss = difference.loss
                row[f"{label}: points lost"] = (
                    f"{loss.estimate:.1f} [{loss.low:.1f}, {loss.high:.1f}], p={difference.p:.2g}"
                )
        rows.append(row)
    return rows


def _fidelity_cells(name: str, scores: Scores) -> dict[str, str]:
    score = scores.fidelity[name]
    cells = {"perplexity": f"{math.exp(sum(score.nll) / len(score.nll)):.3f}"}
    if name != "source":
        interval = bootstrap_mean(score.kl)
        cells["KL to source"] = f"{sum(score.kl) / len(score.kl):.4f} [{interval.low:.4f}, {interval.high:.4f}]"
        cells["top-1"] = f"{sum(score.top1) / len(score.top1):.1%}"
    return cells


def _columns(rows: list[dict[str, str]]) -> list[str]:
    """Every column, in the order of the fullest row."""
    return list(dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row))


def table_of(rows: list[dict[str, str]], title: str = "") -> Table:
    """A rich table; a cell nobody measured stays empty."""
    columns = _columns(rows)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    return table


def markdown_table(rows: list[dict[str, str]]) -> str:
    """The same rows as a Markdown table."""
    columns = _columns(rows)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row.get(column, "") for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def markdown(run: RunRecord, rows: list[dict[str, str]]) -> str:
    """report.md: table, verdicts, checks, the worst linears, the recipe."""
    parts = [f"# {run.lock.source.name}", f"Source commit `{run.lock.source.commit}`.", markdown_table(rows)]
    if run.verdicts:
        parts.append(
            "## Gates\n\n" + "\n".join(f"- **{v.verdict}** {v.output}: {v.gate}: {v.reason}" for v in run.verdicts)
        )
    for name, manifest in run.manifests.items():
        measured = [item for item in manifest.ledger.items() if "error" in item[1]]
        if measured:  # NF4 is made without inputs, so nobody knows its output errors
            worst = sorted(measured, key=lambda item: -item[1]["error"])[:10]
            lines = ["| linear | output error, round to nearest | output error, this artifact |", "|---|---|---|"]
            lines += [f"| {linear} | {r['rtn_error']:.4f} | {r['error']:.4f} |" for linear, r in worst]
            parts.append(f"## {name}: the ten linears with the largest relative output error\n\n" + "\n".join(lines))
    for name, checked in run.checks.items():
        lines = [f"- {note}" for note in run.manifests[name].notes]
        lines += [f"- {check.status}: {check.name}: {check.detail}" for check in checked.checks]
        parts.append(f"## {name}: checks\n\n" + "\n".join(lines))
    parts.append(f"## Recipe\n\n```yaml\n{run.recipe_text.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def print_scores(scores: Scores) -> None:
    """`qtool evaluate`'s table."""
    console.print(table_of(score_rows(scores, {})))


def print_verification(result: Verification) -> None:
    """Every check of `qtool verify`."""
    table = Table(title=str(result.path), title_justify="left")
    for column in ("check", "result", "detail"):
        table.add_column(column, overflow="fold")
    for check in result.checks:
        table.add_row(check.name, MARKS[check.status], check.detail)
    console.print(table)
    console.print("sound" if result.sound else "[red]NOT sound[/]: a required check failed")


def _print_summary(name: str, result: Verification) -> None:
    rules = [check for check in result.checks if not check.required]
    broken = [check.name for check in rules if check.status == "fail"]
    state = "verified" if result.sound else "[red]NOT sound[/]"
    notes = f"; {len(rules) - len(broken)} of {len(rules)} runtime rules hold" if rules else ""
    console.print(f"{name}: {state}{notes} (`qtool verify {result.path}` lists them)", highlight=False, soft_wrap=True)


def print_plan(job: Job) -> None:
    """`--dry-run`: what each linear becomes, then totals, memory and disk."""
    from qtool.quantize.memory import peak_bytes

    for name, plan in job.plans.items():
        table = Table(title=f"{job.source.name} -> {name}", title_justify="left")
        grouped = "type" if isinstance(plan, GgufPlan) else "group size"
        for column in ("linear", "layers", "shape [out, in]", grouped, "bytes each"):
            table.add_column(column, justify="left" if column == "linear" else "right")
        kinds: dict[tuple[str, int, int, str, int], int] = {}
        for linear in plan.linears:
            kind = linear.name[len(job.architecture.prefix) :].split(".", 1)[1]
            key = (kind, linear.out, linear.columns, linear.type or str(linear.group_size), linear.nbytes)
            kinds[key] = kinds.get(key, 0) + 1
        for (kind, out, columns, group, nbytes), count in kinds.items():
            table.add_row(kind, str(count), f"[{out}, {columns}]", group, f"{nbytes:,}")
        console.print(table)
        for note in plan.notes if isinstance(plan, GgufPlan) else ():
            console.print(f"{name}: {note}", highlight=False, soft_wrap=True)
        console.print(
            f"{name}: {plan.nbytes / 1e9:.3f} GB ({plan.nbytes / 2**30:.3f} GiB), {plan.bits_per_weight:.3f} bpw over "
            f"{plan.parameters:,} parameters; disk {plan.nbytes / 1e9:.3f} GB",
            highlight=False,
        )
    recipe = job.recipe
    methods = [method for method in recipe.outputs if method.name in job.plans]
    shapes = {name: info.shape for name, info in job.checkpoint.tensors.items()}
    tokens = recipe.calibration.samples * recipe.calibration.length
    memory = peak_bytes(job.architecture, shapes, methods, tokens, job.device.type)
    console.print(
        f"peak memory of the conversion on {job.device.type}: about {memory / 2**30:.2f} GiB", highlight=False
    )
