"""Long tasks by length and depth: what of each was solved, with look-alikes and without."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qtool.evaluate.rates import mean_rate
from qtool.evaluate.statistics import Interval
from qtool.runs.summary import TaskSummary

_PLACE = re.compile(r"^long-[a-z]+/(\d+)/([\d.]+)/(\d+)/\d+$")  # as evaluate.tasks.made names problems


@dataclass(frozen=True)
class Place:
    """``length``: tokens of the prompt; ``depth``: 0 its beginning, 1 its end."""

    length: int
    depth: float
    look_alikes: int


def place_of(problem: str) -> Place | None:
    """Of a long task's problem; None of any other."""
    found = _PLACE.match(problem)
    return Place(int(found[1]), float(found[2]), int(found[3])) if found else None


def is_long(task: TaskSummary) -> bool:
    """Whether its problems have lengths and depths."""
    return any(place_of(problem) for problem in task.solved)


def by_depth(task: TaskSummary) -> dict[tuple[float, int], float]:
    """(depth, length) -> share that was solved, look-alikes or none."""
    cells: dict[tuple[float, int], list[int]] = {}
    for place, solved in _places(task):
        cells.setdefault((place.depth, place.length), []).append(solved)
    return {cell: sum(found) / len(found) / task.samples for cell, found in cells.items()}


def by_length(task: TaskSummary) -> dict[tuple[int, bool], Interval]:
    """(length, whether there were look-alikes) -> share that was solved."""
    cells: dict[tuple[int, bool], list[int]] = {}
    for place, solved in _places(task):
        cells.setdefault((place.length, place.look_alikes > 0), []).append(solved)
    return {cell: mean_rate(found, task.samples) for cell, found in sorted(cells.items())}


def _places(task: TaskSummary) -> Iterator[tuple[Place, int]]:
    for problem, solved in task.solved.items():
        if (place := place_of(problem)) is not None:
            yield place, solved
