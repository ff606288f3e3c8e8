"""What `qtool plan` prints: an answer for each format, then the grid."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from qtool.bounds import Range
from qtool.plan import Answer, Plan, gib
from qtool.sizing import Cell

console = Console()
if not console.is_terminal:
    console = Console(width=max(console.width, 120))  # a file has room for the grid


def print_plan(plan: Plan) -> None:
    """Answers, notes, then one table for each kind of card."""
    for answer in plan.answers:
        for line in answer_lines(plan, answer):
            console.print(line, highlight=False, soft_wrap=True)
    for note in plan.notes:
        console.print(f"[dim]{note}[/]", highlight=False, soft_wrap=True)
    for card in dict.fromkeys(answer.setting.card.key for answer in plan.answers):
        console.print(_table(plan, card))
    console.print(
        "GiB on each card; ! does not fit. tok/s: all sequences together, from the slowest expected to the bound that "
        "no machine beats; first token: seconds, likewise.",
        highlight=False, soft_wrap=True, style="dim",
    )  # fmt: skip


def answer_lines(plan: Plan, answer: Answer) -> list[str]:
    """Fits or not, how long, how many, what to change, what to type."""
    s, w = answer.setting, answer.setting.weights
    cards = f"{s.cards} x {s.card.key}" if s.cards > 1 else s.card.key
    size = f"{w.bits_per_weight:.2f} bpw, {gib(w.nbytes)} GiB"
    head = f"{w.format} ({size}) on {cards} with {s.engine}, {s.kv_dtype} cache"
    if answer.faults:
        return [f"[red]cannot be served[/]  {head}: {'; '.join(answer.faults)}", *_advice(plan, answer)]
    if answer.fits:
        least = min(plan.contexts)
        fewest = min(plan.sequences)
        each = "one sequence" if fewest == 1 else f"each of {fewest} sequences"
        known = f" (all of the model's {answer.context:,})" if answer.context == s.geometry.max_context else ""
        text = (
            f"[green]fits[/]  {head}: {each} of up to {answer.context:,} tokens{known}, or up to "
            f"{answer.sequences:,} of {least:,}"
        )
        return [text, f"      {answer.command}", *_advice(plan, answer)]
    cell = answer.smallest
    short = f"needs {gib(cell.total)} GiB of {gib(cell.limit)} at {cell.context:,} tokens x {cell.sequences}"
    lines = [f"[red]does not fit[/]  {head}: {short}"]
    if answer.offload is not None:
        speed = _speed(answer.offload.step, cell.sequences)
        lines += [f"      {answer.command}", f"      {answer.offload.why}: {speed} tok/s"]
    return [*lines, *_advice(plan, answer)]


def _advice(plan: Plan, answer: Answer) -> list[str]:
    asked = [(min(plan.contexts), answer.least_changes), (max(plan.contexts), answer.changes)]
    return [
        f"      to hold {context:,} tokens x {min(plan.sequences)}: {', or '.join(changes)}"
        for context, changes in dict(asked).items() if changes
    ]  # fmt: skip


def _table(plan: Plan, card: str) -> Table:
    answers = [answer for answer in plan.answers if answer.setting.card.key == card]
    table = Table(title=f"{plan.headers.name} on {answers[0].setting.cards} x {card}", title_justify="left",
                  box=box.SIMPLE_HEAD, padding=(0, 1))  # fmt: skip
    columns = ["format", "cache", "context", *(f"x {n}" for n in plan.sequences), "tok/s x 1", "first token"]
    if len(plan.sequences) > 1:
        columns.insert(-1, f"tok/s x {max(plan.sequences)}")
    for column in columns:
        table.add_column(column, justify="left" if column in ("format", "cache") else "right", no_wrap=True)
    for answer in answers:
        for row in grid_rows(plan, answer):
            table.add_row(*row)
    return table


def grid_rows(plan: Plan, answer: Answer) -> list[list[str]]:
    """One row for each context: GiB for each number of sequences, then speeds where they fit."""
    rows = []
    for number, context in enumerate(plan.contexts):
        cells = {cell.sequences: cell for cell in answer.cells if cell.context == context}
        few, many = cells[min(cells)], cells[max(cells)]
        speeds = [_cell_speed(few)] + ([_cell_speed(many)] if len(cells) > 1 else [])
        first = "" if few.first_token is None or not few.fits else _seconds(few.first_token)
        label = (answer.setting.weights.format, answer.setting.kv_dtype) if number == 0 else ("", "")
        sizes = [f"{gib(cell.total)}{'' if cell.fits and not answer.faults else ' !'}" for cell in cells.values()]
        rows.append([*label, f"{context:,}", *sizes, *speeds, first])
    return rows


def _cell_speed(cell: Cell) -> str:
    return _speed(cell.step, cell.sequences) if cell.fits else ""


def _speed(step: Range, sequences: int) -> str:
    rate = step.per_second(sequences)
    low = "?" if rate.slow is None else f"{rate.slow:.3g}"
    return f"{low} - {rate.best:.3g}"


def _seconds(found: Range) -> str:
    high = "?" if found.slow is None else f"{found.slow:.2g}"
    return f"{found.best:.2g} - {high} s"
