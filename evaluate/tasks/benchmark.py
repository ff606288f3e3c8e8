"""What a benchmark is: how its rows become problems, how answers become programs, and where its data sets lie."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qtool.evaluate.tasks.extract import cut, program_from_chat, without_examples
from qtool.evaluate.tasks.made import Making
from qtool.evaluate.tasks.problems import Problem
from qtool.evaluate.tasks.rows import Row


@dataclass(frozen=True)
class DataSet:
    """A data set on the Hub. ``files`` are patterns, of which the first that matches anything counts."""

    repository: str
    revision: str
    files: tuple[str, ...]
    problems: int
    licence: str
    local: str  # what its publisher's own file is called


def holds_stop(problem: Problem, text: str) -> bool:
    """Whether one of the problem's own stop sequences has been written."""
    return any(stop in text for stop in problem.stop)


def prompt_and_text(problem: Problem, text: str) -> str:
    """The prompt, gone on with up to the first stop sequence."""
    return problem.prompt + cut(text, problem.stop).rstrip("\n") + "\n"


def python_in_reply(problem: Problem, text: str) -> str:
    """The Python that a chat model's reply holds, below the prompt where it is the function's body alone."""
    made = program_from_chat(text, problem.prompt, problem.entry_point)
    return without_examples(made) if problem.instruction else made


@dataclass(frozen=True)
class Benchmark:
    """One published format of problems. ``data_sets``: name of a task -> where its rows lie.

    ``read(place, row)``: a problem, or None for a row that is none of the task's; raises QtoolError naming the key at
    fault. ``recognizes``: whether a row of a file has this format, by keys that no other has. ``day``: that of a
    problem's contest, where problems have one. ``installed``: a task's own file on this machine, in its publisher's
    package. ``finished(problem, text)``: whether nothing that follows in a base model's text can belong to the answer;
    ``from_text`` and ``from_reply``: the program that is judged, out of a base model's text and a chat model's reply.
    ``whole_solutions``: the published solution is a program of its own, not the prompt's end; ``prompt_in_test``: the
    test may use helper functions that the prompt defines. ``make``: its problems, where they are in no file but made
    here. ``self_checked``: whether a problem's known answers are put to the harness before a model is.
    """

    format: str
    data_sets: Mapping[str, DataSet]
    read: Callable[[str, Row], Problem | None]
    recognizes: Callable[[Row], bool] = lambda row: False
    day: Callable[[str, Row], datetime.date] | None = None
    installed: Callable[[str], Path | None] = lambda task: None
    finished: Callable[[Problem, str], bool] = holds_stop
    from_text: Callable[[Problem, str], str] = prompt_and_text
    from_reply: Callable[[Problem, str], str] = python_in_reply
    whole_solutions: bool = False
    prompt_in_test: bool = False
    make: Callable[[Making], list[Problem]] | None = None
    self_checked: Callable[[Problem], bool] = lambda problem: True
