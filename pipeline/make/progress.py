"""How far the work is: a bar where somebody watches; elsewhere (a file, a CI log) a line now and then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.text import Text

BEGUN = "begun"  # of a task: the steps that were done before this run
PAUSE = 10.0  # seconds between two lines of one stage


def seconds_to_go(task: Task) -> float | None:
    """By the mean of the steps this run has done, however slow they are; None before the first, and after the last."""
    done = task.completed - task.fields.get(BEGUN, 0)
    if done <= 0 or task.total is None or task.elapsed is None or task.finished:
        return None
    return float(task.elapsed / done * (task.total - task.completed))


def duration(seconds: float) -> str:
    """`0:32`, `1:02:03`."""
    text = str(timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0") if text.startswith("0:0") else text.removeprefix("0:")


class ToGo(ProgressColumn):
    """`12:40 to go`; rich's own column looks at the last 30 seconds, in which no large layer ends."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = seconds_to_go(task)
        return Text("" if left is None else f"{duration(left)} to go", style="progress.remaining")


class Stages(Progress):
    """A bar a stage; ``lines``: no bars, but a line when a stage begins, one in `PAUSE` seconds while it lasts, and one
    when it ends, where it lasted that long."""

    def __init__(self, *columns: ProgressColumn, lines: bool, silent: bool = False, **settings: Any) -> None:
        super().__init__(*columns, disable=lines or silent, **settings)
        self._lines = lines
        self._said: dict[TaskID, float] = {}

    def add_task(
        self, description: str, start: bool = True, total: float | None = 100.0, completed: int = 0,
        visible: bool = True, **fields: Any,
    ) -> TaskID:  # fmt: skip
        """As rich's, which see; what is ``completed`` now does not count towards the time to go."""
        number = super().add_task(description, start, total, completed, visible, **{BEGUN: completed} | fields)
        if self._lines:
            self._say(self._tasks[number])
        return number

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As rich's."""
        super().advance(task_id, advance)
        self._say_now_and_then(self._tasks[task_id])

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As rich's."""
        before = self._tasks[task_id].completed
        super().update(task_id, **changes)
        if self._tasks[task_id].completed != before:
            self._say_now_and_then(self._tasks[task_id])

    def _say_now_and_then(self, task: Task) -> None:
        if self._lines and self.get_time() - self._said[task.id] >= PAUSE:
            self._say(task)

    def _say(self, task: Task) -> None:
        self._said[task.id] = self.get_time()
        click.echo(line(task), err=True)


def line(task: Task) -> str:
    """`quantizing layers: 3 of 28 after 1:36, about 13:20 to go`."""
    total = task.total or 0
    counted = "" if total <= 1 else f": {task.completed:.0f} of {total:.0f}"
    if task.completed <= task.fields.get(BEGUN, 0) or task.elapsed is None:
        return f"{task.description}{counted}"
    left = seconds_to_go(task)
    to_go = "" if left is None else f", about {duration(left)} to go"
    return f"{task.description}{counted} after {duration(task.elapsed)}{to_go}"


@contextmanager
def progress_bar(silent: bool = False) -> Iterator[Progress]:
    """The one progress display: written to stderr; lines where nobody watches; ``silent``: nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Elapsed(), ToGo())
    console = Console(stderr=True)
    with Stages(*columns, console=console, lines=not (silent or console.is_terminal), silent=silent) as stages:
        yield stages
