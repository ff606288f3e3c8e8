"""`qtool batch` in the terminal: what each model takes, and where it stands."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.batch.engine import Task
from qtool.batch.state import State
from qtool.report.columns import console, print_table

WIDE = 28  # of a name


def print_tasks(tasks: Sequence[Task]) -> None:
    """A row for each model: card, memory, disk, time."""
    rows = []
    for task in tasks:
        n = task.needs
        card = f"{n.cards} x {n.card.key}" if n.card and n.cards > 1 else n.card.key if n.card else "cpu"
        rows.append({
            "model": task.name[:WIDE], "card": card, "GB of it": f"{n.device_bytes / 1e9:.1f}" if n.card else "",
            "host GB": f"{n.host_bytes / 1e9:.1f}", "disk GB": f"{n.disk_bytes / 1e9:.1f}",
            "hours": "no limit" if n.seconds is None else f"{n.seconds / 3600:.1f}",
        })  # fmt: skip
    print_table(console, rows, left=("card",))


def print_states(states: Sequence[State]) -> None:
    """A line for each model, then how many are finished."""
    for state in states:
        told = "; ".join(f"{name} {said}" for name, said in state.artifacts.items())
        took = "" if state.seconds is None else f"{state.seconds / 60:.1f} min"
        line = "  ".join(part for part in (f"{state.name}: {state.state}", state.run[:8], told, took) if part)
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    done = sum(state.finished for state in states)
    console.print(f"{done} of {len(states)} finished", highlight=False)
