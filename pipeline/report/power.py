"""`qtool evaluate --plan`: how many problems show a loss, and what each task would show."""

from __future__ import annotations

from collections.abc import Mapping

from rich.markup import escape

from qtool.report.columns import console, print_table, say
from qtool.runs.evidence import plain
from qtool.runs.power import ASSUMED, Seen, TaskPower, needed, pooled

OTHERS = (0.02, 0.05, 0.1, 0.2)


def print_power(points: float, tasks: list[TaskPower], seen: Mapping[str, Seen], given: float | None) -> None:
    """The answer, then a row for each task, then what it rests on."""
    share = given if given is not None else pooled(seen).share or ASSUMED
    ((share, problems),) = needed(points, [share])
    unit = "point" if points == 1 else "points"
    say(f"To show a loss of {plain(points)} {unit}: {problems:,} problems, if {share:.1%} of the outcomes change.")
    others = ", ".join(f"{n:,} at {other:.0%}" for other, n in needed(points, OTHERS))
    say(f"At other shares: {others}.")
    rows = [
        {
            "task": task.task, "problems": f"{task.problems:,}",
            "outcomes that change": f"{task.discordance:.1%}{'' if task.seen else ' *'}",
            "shows losses from": "none" if task.shown is None else f"{task.shown:.1f} points",
            "enough": "yes" if task.shown is not None and task.shown <= points else "",
        }
        for task in tasks
    ]  # fmt: skip
    print_table(console, rows)
    if not any(task.shown is not None and task.shown <= points for task in tasks):
        say("No task alone is enough: take several, or held-out text, whose KL sees smaller losses (--text).")
    told = "as given" if given is not None else told_by(pooled(seen))
    say(escape(f"* {told}. With 80 % power, exact McNemar test at 5 %; of several comparisons each needs more (Holm)."))


def told_by(seen: Seen) -> str:
    """Where the share of outcomes that change is from."""
    counted = f"{seen.changed:,} of {seen.asked:,} outcomes of artifacts in earlier runs"
    if not seen.asked:
        return f"assumed: {ASSUMED:.0%}; no earlier run tells"
    if seen.share is None:
        return f"assumed: {ASSUMED:.0%}; {counted} changed, too little to tell"
    return f"at most that (95 % sure): {counted} changed" if seen.few else f"from {counted}"
