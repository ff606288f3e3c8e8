"""What `qtool plan` prints: an answer for each format, then the grid."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.report.columns import print_table, wide
from qtool.report.tables import Row, rate_text
from qtool.sizing.bounds import Range
from qtool.sizing.fit import Estimate
from qtool.sizing.plan import Answer, Plan, gib
from qtool.sizing.sharing import Shared

MIB = 2**20


def print_plan(plan: Plan) -> None:
    """Answers, notes, then one table for each kind of card."""
    for answers in _alike(plan):
        for line in answer_lines(plan, *answers):
            wide.print(line, highlight=False, soft_wrap=True)
    for note in plan.notes:
        wide.print(f"[dim]{note}[/]", highlight=False, soft_wrap=True)
    for card, number in dict.fromkeys((a.setting.card.key, a.setting.cards) for a in plan.answers):
        title = f"{plan.headers.name} on {number} x {card}"
        print_table(wide, grid_rows(plan, card), title, lead=3, left=("format", "cache"))
    wide.print(
        "GiB on each card; ! does not fit. tok/s: all sequences together, from the slowest expected to the bound that "
        "no machine beats; first token: seconds, likewise. A format's rows end with the first context that does not "
        "fit at all (--json has all).",
        highlight=False, soft_wrap=True, style="dim",
    )  # fmt: skip


def shared_line(shared: Shared) -> str:
    """What a beginning that all users' prompts share is worth."""
    text = f"a beginning of {shared.tokens:,} tokens, shared by {shared.users} users: "
    if shared.blocks:
        text += f"{shared.blocks:,} blocks of the cache saved ({shared.nbytes / MIB:,.1f} MiB)"
    else:
        text += "no block of the cache saved"
    if shared.seconds is not None and shared.held:
        slow = "" if shared.seconds.slow is None else f" to {_two_digits(1e3 * shared.seconds.slow)}"
        text += f"; each first token but the first comes {_two_digits(1e3 * shared.seconds.best)}{slow} ms sooner"
    return text


def _alike(plan: Plan) -> list[list[Answer]]:
    """Answers, those with the same refusal and advice together."""
    groups: dict[object, list[Answer]] = {}
    for number, answer in enumerate(plan.answers):
        s = answer.setting
        same = (s.card.key, s.engine, s.kv_dtype, answer.faults, tuple(_advice(plan, answer)))
        groups.setdefault(same if answer.faults else number, []).append(answer)
    return list(groups.values())


def answer_lines(plan: Plan, answer: Answer, *alike: Answer) -> list[str]:
    """Fits or not, how long, how many, what to change, what to type. ``alike``: more that are refused for the same."""
    s = answer.setting
    cards = f"{s.cards} x {s.card.key}" if s.cards > 1 else s.card.key
    sized = [(a.setting.weights.format, a.setting.weights) for a in (answer, *alike)]
    sizes = ", ".join(f"{name} ({w.bits_per_weight:.2f} bpw, {gib(w.nbytes)} GiB)" for name, w in sized)
    head = f"{sizes} on {cards} with {s.engine}, {s.kv_dtype} cache"
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
        saved = [f"      {shared_line(answer.shared)}"] if answer.shared else []
        return [text, f"      {answer.command}", *saved, *_advice(plan, answer)]
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


def grid_rows(plan: Plan, card: str) -> list[Row]:
    """For each format and context: GiB for each number of sequences, then speeds where they fit. A format ends with the
    first context of which nothing fits: no longer one does."""
    rows = []
    for answer in plan.answers:
        if answer.setting.card.key != card:
            continue
        label = {"format": answer.setting.weights.format, "cache": answer.setting.kv_dtype}
        for context in plan.contexts:
            cells = [cell for cell in answer.cells if cell.context == context]
            rows.append(label | {"context": f"{context:,}"} | _cells(cells, bool(answer.faults)))
            label = {}
            if answer.faults or not any(cell.fits for cell in cells):
                break
    return rows


def _cells(cells: Sequence[Estimate], refused: bool) -> Row:
    few, many = min(cells, key=lambda cell: cell.sequences), max(cells, key=lambda cell: cell.sequences)
    row = {f"x {cell.sequences}": f"{gib(cell.total)}{'' if cell.fits and not refused else ' !'}" for cell in cells}
    row[f"tok/s x {few.sequences}"] = "" if refused else _cell_speed(few)
    if len(cells) > 1:
        row[f"tok/s x {many.sequences}"] = "" if refused else _cell_speed(many)
    unknown = refused or few.first_token is None or not few.fits
    return row | {"first token": "" if unknown or few.first_token is None else _seconds(few.first_token)}


def _cell_speed(cell: Estimate) -> str:
    return _speed(cell.step, cell.sequences) if cell.fits else ""


def _speed(step: Range, sequences: int) -> str:
    rate = step.per_second(sequences)
    low = "?" if rate.slow is None else rate_text(rate.slow)
    return f"{low} - {rate_text(rate.best)}"


def _seconds(seconds: Range) -> str:
    high = "?" if seconds.slow is None else _two_digits(seconds.slow)
    return f"{_two_digits(seconds.best)} - {high} s"


def _two_digits(value: float) -> str:
    """Never an exponent, nor less than a millisecond."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}" if value >= 0.001 else "0.001"
