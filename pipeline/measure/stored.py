"""Scores as files of a run: found again under their key, in this run or an earlier one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qtool.convert.files.durable import load, save
from qtool.evaluate.engines.condition import Condition
from qtool.evaluate.journal import Journal
from qtool.evaluate.scorecard import FidelityScore, PositionScore, TaskScore

Score = TypeVar("Score", TaskScore, FidelityScore, PositionScore)


def find(
    kind: type[Score], run: Path, runs: Path, name: str, key: str, fault: Callable[[Score], str] = lambda score: ""
) -> Score | None:
    """The score in a file of that ``name`` with that key, of this ``run`` or any other of ``runs``; damaged ones are
    set aside."""
    places = dict.fromkeys([*run.glob(f"scores/{name}"), *runs.glob(f"*/scores/{name}")])
    for path in places:
        if (score := load(kind, path, lambda s: fault(s) if s.key == key else "it is of another key")) is not None:
            return score
    return None


def keep(run: Path, name: str, score: Score, subject: str) -> Score:
    """An earlier score as this run's; what a kill left of its journal is tidied away."""
    score = score.model_copy(update={"subject": subject})
    save(run / "scores" / name, score)
    Journal(run / "scores" / f"{name.removesuffix('.json')}.jsonl").close()
    return score


def label(task: str, condition: Condition) -> str:
    """Tasks under two conditions are two tasks: they are never paired."""
    return f"{task} @ {condition.name}" if condition.name else task


def file_name(task: str) -> str:
    """A task's name, as far as files can have it."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", task).strip("_")
