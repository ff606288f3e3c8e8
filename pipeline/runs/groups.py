"""Scores by difficulty and by category, where a task says these of its problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qtool.evaluate.rates import mean_rate
from qtool.evaluate.scorecard import TaskScore
from qtool.evaluate.statistics import Interval

MOST = 30  # values of one kind: what has more tells nothing of a group


@dataclass(frozen=True)
class Group:
    """Problems of which a task says the same. ``kind``: difficulty or category; ``rates``: model -> pass@1; ``lost``
    and ``gained``: artifact -> problems whose share of right answers fell, and rose, against the source's."""

    kind: str
    value: str
    problems: int
    rates: Mapping[str, Interval]
    lost: Mapping[str, int]
    gained: Mapping[str, int]


def groups_of(scores: Mapping[str, TaskScore]) -> list[Group]:
    """``scores``: model -> its score of one task. Kinds with two values or more, each in the order of the task."""
    said = next((score.groups for score in scores.values() if score.groups), {})
    found = []
    for kind in dict.fromkeys(kind for about in said.values() for kind in about):
        problems: dict[str, list[str]] = {}
        for problem in next(iter(scores.values())).outcomes:
            if value := said.get(problem, {}).get(kind):
                problems.setdefault(value, []).append(problem)
        if 1 < len(problems) <= MOST:
            found += [_group(kind, value, problems[value], scores) for value in _ordered(problems)]
    return found


def _ordered(values: Mapping[str, object]) -> list[str]:
    """Easy before hard, levels by number, else as they come."""
    known = {"easy": 0, "medium": 1, "hard": 2}
    if all(value.lower() in known for value in values):
        return sorted(values, key=lambda value: known[value.lower()])
    return sorted(values, key=lambda value: (len(value), value)) if all(v[-1:].isdigit() for v in values) else [*values]


def _group(kind: str, value: str, problems: list[str], scores: Mapping[str, TaskScore]) -> Group:
    solved = {
        name: [sum(answer.outcome == "passed" for answer in score.answers(problem)) for problem in problems]
        for name, score in scores.items()
    }
    rates = {name: mean_rate(counts, scores[name].samples) for name, counts in solved.items()}
    pairs = {
        name: list(zip(solved["source"], counts, strict=True)) for name, counts in solved.items() if name != "source"
    }
    lost = {name: sum(after < before for before, after in pair) for name, pair in pairs.items()}
    gained = {name: sum(after > before for before, after in pair) for name, pair in pairs.items()}
    return Group(kind, value, len(problems), rates, lost, gained)
