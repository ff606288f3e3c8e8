"""What `qtool plan` prints: one screen, a row for each format; with --full each answer in words, then the grid."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape

from qtool.report.columns import console, print_table, say, wide
from qtool.report.tables import Row, rate_text
from qtool.sizing.bounds import Range
from qtool.sizing.fit import GIB, Estimate
from qtool.sizing.formats import SOURCE
from qtool.sizing.plan import Answer, Plan, gib
from qtool.sizing.sharing import Shared

MIB = 2**20


def print_plan(plan: Plan) -> None:
    """One table for each kind of card, what to change where nothing fits, one command."""
    for card, number in _cards(plan):
        answers = [answer for answer in plan.answers if answer.setting.card.key == card]
        memory = answers[0].setting.card.memory / GIB
        print_table(console, short_rows(plan, answers), f"{plan.headers.name} on {number} x {card} ({memory:.1f} GiB)",
                    left=("engine",))  # fmt: skip
        for line in _changes(answers):
            say(line)
    for note in plan.notes:
        say(f"[dim]{escape(note)}[/]")
    served = [answer for answer in plan.answers if answer.fits]
    for answer in [a for a in served if a.setting.weights.family != SOURCE][:1] or served[:1]:
        s = answer.setting
        if answer.shared:
            say(escape(f"{s.weights.format}: {shared_line(answer.shared)}"))
        typed = escape(f"serve {s.weights.format} on {s.card.key}: {answer.command}")
        console.print(typed, soft_wrap=True, highlight=False)  # one line, so that it can be copied
    say(
        f"[dim]GiB: of weights (2**30 bytes). longest text: tokens that one user can have. users: at once, with "
        f"{min(plan.contexts):,} tokens each. tokens/s: of one user, from the slowest expected to the bound that no "
        "machine beats. --full: every command, memory and speed by context and users; --json: all of it.[/]"
    )


def short_rows(plan: Plan, answers: Sequence[Answer]) -> list[Row]:
    """For each format: GiB of weights, what serves it, how much text of how many users fits, tokens a second."""
    several = len({(a.setting.weights.format, a.setting.engine) for a in answers}) < len(answers)
    rows = []
    for answer in answers:
        s, cell = answer.setting, answer.smallest
        row = {"format": s.weights.format} | ({"cache": s.kv_dtype} if several else {})
        row |= {"GiB": gib(s.weights.nbytes) if s.weights.nbytes > 1e7 else "<0.01", "engine": s.engine}
        if answer.faults:
            row |= {"longest text": "refused"}
        elif not answer.fits:
            row |= {"longest text": f"needs {cell.total / GIB:.1f} GiB"}
        else:
            row |= {
                "longest text": f"{answer.context:,}",
                "users": f"{answer.sequences:,}",
            }
            row |= {"tokens/s": _speed(cell.step, cell.sequences)}
        rows.append(row)
    return rows


def _changes(answers: Sequence[Answer]) -> list[str]:
    """Why formats are refused, and what would hold those that do not fit; one line for all that are alike."""
    said: dict[str, list[str]] = {}
    for answer in answers:
        s = answer.setting
        if answer.faults:
            why = f"cannot be served: {'; '.join(answer.faults)}"
        elif not answer.fits and answer.least_changes:
            why = f"more than the {answer.smallest.limit / GIB:.1f} GiB that {s.engine} takes; what does: "
            why += answer.least_changes[-1]
        else:
            continue
        said.setdefault(why, []).append(s.weights.format)
    return [escape(f"{', '.join(names)}: {why}") for why, names in said.items()]


def _cards(plan: Plan) -> list[tuple[str, int]]:
    return list(dict.fromkeys((a.setting.card.key, a.setting.cards) for a in plan.answers))


def print_full_plan(plan: Plan) -> None:
    """Answers, notes, then one table for each kind of card."""
    for answers in _alike(plan):
        for line in answer_lines(plan, *answers):
            wide.print(line, highlight=False, soft_wrap=True)
    for note in plan.notes:
        wide.print(f"[dim]{note}[/]", highlight=False, soft_wrap=True)
    for card, number in _cards(plan):
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
