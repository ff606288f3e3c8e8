"""Long tasks in the report: a row for each model and length, a map of lengths and depths for each model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from qtool.evaluate.buckets import tokens_text
from qtool.report.figures import WIDTH, svg
from qtool.report.maps import cell, key
from qtool.report.markup import visible
from qtool.report.tables import Row
from qtool.runs.depths import by_depth, by_length, is_long
from qtool.runs.evidence import task_label
from qtool.runs.summary import Summary

TITLE = "Long tasks, by length and depth"
NOTE = (
    "Share of problems that were solved, with 95 % intervals; length: tokens of the prompt. Control: the same problems "
    "without anything that looks like what is asked for."
)
Drawn = tuple[str, str, str, Callable[[int], str]]  # name, title, caption, what draws it at a width


def depth_rows(summary: Summary) -> list[Row]:
    """A row for each model, task and half."""
    rows = []
    for name, model in summary.models.items():
        for task, found in model.tasks.items():
            shares = by_length(found) if is_long(found) else {}
            for alike in sorted({alike for _, alike in shares}, reverse=True):
                row = {"model": name, "task": task_label(task), "half": "look-alikes" if alike else "control"}
                for (length, kind), rate in shares.items():
                    if kind == alike:
                        said = f"{rate.estimate:.0%} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
                        row[tokens_text(length)] = said
                rows.append(row)
    return rows


def depth_pictures(summary: Summary) -> list[Drawn]:
    """A map for each model and long task."""
    found: list[Drawn] = []
    for name, model in summary.models.items():
        for task, scored in model.tasks.items():
            if is_long(scored):
                title = f"{name}: {task_label(task)}"
                caption = "Share solved by length of the prompt and by where in it the needle lies (0 %: beginning)."
                found.append((f"depths-{len(found)}", title, caption, partial(depth_map, by_depth(scored), title)))
    return found


def depth_map(values: Mapping[tuple[float, int], float], label: str, room: int = WIDTH) -> str:
    """Depths down, lengths across; the darker, the more was missed."""
    depths, lengths = sorted({depth for depth, _ in values}), sorted({length for _, length in values})
    left, top, tall = 72, 44, 26
    wide = min(84, (room - left - 12) // len(lengths))
    parts = [f'<text class="soft" text-anchor="end" x="{left - 8}" y="{top - 10}">depth</text>']
    for column, length in enumerate(lengths):
        middle = left + wide * (column + 0.5)
        parts.append(
            f'<text text-anchor="middle" x="{middle:.0f}" y="{top - 10}">{visible(tokens_text(length))}</text>'
        )
    for row, depth in enumerate(depths):
        y = top + tall * row
        parts.append(f'<text class="soft" text-anchor="end" x="{left - 8}" y="{y + 17}">{depth:.0%}</text>')
        for column, length in enumerate(lengths):
            if (value := values.get((depth, length))) is not None:
                parts.append(cell(left + wide * column, y, wide, tall, 1 - value, f"{value:.0%}"))
    bottom = top + tall * len(depths) + 18
    parts += key(left, bottom, "all", "none", label if room == WIDTH else "")
    worst = min(values, key=lambda place: values[place])
    told = (
        f"{label}: from {min(values.values()):.0%} to {max(values.values()):.0%} solved; least at depth "
        f"{worst[0]:.0%} of {worst[1]:,} tokens."
    )
    return svg(label, told, bottom + 24, parts, room)
