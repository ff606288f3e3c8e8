"""How far the work is: a bar where somebody watches; elsewhere (a file, a CI log) a line now and then, at least one a
minute however slow a step is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.table import Column
from rich.text import Text

from qtool.runs import log

BEGUN = "begun"  # of a task: the steps that were done before this run
AT, DOING = "at", "doing"  # of a task: how far work is that does not count as done yet, and what is in work
PAUSE = 10.0  # seconds between two lines of one stage
LOOK = 5.0  # seconds between two looks at what is slow
WIDE = 130  # columns of a terminal that has room for what is in work
BEAT = 30.0  # seconds after which a stage is told of in which no step ended


def seconds_to_go(task: Task) -> float | None:
    """By the mean of the steps this run has done, parts of a step too, however slow they are; None before there is one,
    and after the last."""
    reached = max(task.completed, task.fields.get(AT, 0))
    done = reached - task.fields.get(BEGUN, 0)
    if done <= 0 or task.total is None or task.elapsed is None or task.finished:
        return None
    return float(task.elapsed / done * max(0, task.total - reached))


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

    def __init__(self, *columns: ProgressColumn, lines: bool, disable: bool = False, **settings: Any) -> None:
        super().__init__(*columns, disable=lines or disable, **settings)
        self._lines = lines
        self._said: dict[TaskID, float] = {}
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        """As rich's; lines come even where nothing advances."""
        if self._lines:
            threading.Thread(target=self._beat, name="progress", daemon=True).start()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._ended.set()
        super().__exit__(*raised)

    def _beat(self) -> None:
        while not self._ended.wait(LOOK):
            self.say_slow_ones()

    def say_slow_ones(self) -> None:
        """A line for the stage in work, where it has not been told of for `BEAT` seconds."""
        for task in list(self.tasks)[-2:]:  # answering and judging go on side by side, each with a row of its own
            if not task.finished and self.get_time() - self._said[task.id] >= BEAT:
                self._say(task)

    def add_task(
        self, description: str, start: bool = True, total: float | None = 100.0, completed: int = 0,
        visible: bool = True, **fields: Any,
    ) -> TaskID:  # fmt: skip
        """As rich's, which see; what is ``completed`` now does not count towards the time to go."""
        told = {BEGUN: completed, DOING: ""} | fields
        number = super().add_task(description, start, total, completed, visible, **told)
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
        log.say(
            line(task), event="progress", stage=task.description, done=task.completed, total=task.total,
            seconds=round(task.elapsed or 0, 1), to_go=seconds_to_go(task), doing=task.fields.get(DOING, ""),
        )  # fmt: skip


def line(task: Task) -> str:
    """`quantizing layers: 3 of 28 after 1:36, about 13:20 to go; layer 4, awq: mlp.down_proj`."""
    total = task.total or 0
    counted = "" if total <= 1 else f": {task.completed:.0f} of {total:.0f}"
    if task.elapsed is None or (task.elapsed < 1 and task.completed <= task.fields.get(BEGUN, 0)):
        return f"{task.description}{counted}"
    left = seconds_to_go(task)
    to_go = "" if left is None else f", about {duration(left)} to go"
    doing = "" if task.finished or not task.fields.get(DOING) else f"; {task.fields[DOING]}"
    return f"{task.description}{counted} after {duration(task.elapsed)}{to_go}{doing}"


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """The one progress display: written to stderr; lines where nobody watches."""
    console = Console(stderr=True)
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Elapsed(), ToGo()
    ]  # fmt: skip
    if console.width >= WIDE:
        columns += [TextColumn("{task.fields[doing]}", table_column=Column(no_wrap=True, overflow="ellipsis"))]
    lines = log.voice.as_json or not console.is_terminal
    with Stages(*columns, console=console, lines=lines, disable=log.voice.level < log.NORMAL) as stages:
        yield stages
