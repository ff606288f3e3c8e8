"""What an engine of jobs is: its section of models.yaml, and a function from jobs to files and the commands that start
them."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.recipe.section import Section
from qtool.sizing.accelerators import Accelerator

GIB = 2**30
SECRET = "HF_TOKEN"  # the name of a variable; its value stands in no file
WORK = "/work"  # where a job in a container finds the volume, and runs
RECIPE_VARIABLE = "QTOOL_RECIPE"


@dataclass(frozen=True)
class Needs:
    """What a job asks an engine for. ``card``: the kind, None for a processor alone; ``device_bytes``: of each of
    ``cards``; ``named``: the user named the card, so that no other will do; ``seconds``: after which the engine may end
    the job (None: no limit)."""

    card: Accelerator | None
    cards: int
    named: bool
    processors: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    seconds: int | None

    @property
    def host_gib(self) -> int:
        """Whole GiB, a tenth more than was planned, for what the engine counts beside: files that are being written."""
        return math.ceil(1.1 * self.host_bytes / GIB)

    @property
    def disk_gb(self) -> int:
        """Whole GB."""
        return math.ceil(self.disk_bytes / 1e9)


@dataclass(frozen=True)
class Task:
    """A model's job. ``name``: letters, digits, dots and dashes, the run's name; ``recipe``: its text, with what
    models.yaml set in it; nothing else in it is a stranger's."""

    name: str
    recipe: str
    needs: Needs

    @property
    def label(self) -> str:
        """The name for engines that take small letters, digits and dashes."""
        return label_of(self.name)

    @property
    def file(self) -> str:
        """The recipe's, in the folder of job files."""
        return f"recipes/{self.name}.yaml"

    def options(self, runs: str, given: bool = True) -> list[str]:
        """Of `qtool run`, behind the recipe. ``given``: the engine gives the job its card; where it does not, and
        nobody named one, the job takes what the machine has."""
        cards = self.needs.cards if self.needs.card else 1
        device = "cpu" if self.needs.card is None else "cuda" if given or self.needs.named else "auto"
        where = ["--gpus", str(cards)] if cards > 1 else ["--device", device]
        return [*where, "--runs", runs, "--name", self.name]


@dataclass(frozen=True)
class Place:
    """Where files and runs are. ``folder``: of the job files; ``home``: the current folder, which names in recipes are
    relative to; ``runs``: as typed; ``image``: of containers, None where models.yaml names none."""

    folder: Path
    home: Path
    runs: str
    image: str | None = None


@dataclass(frozen=True)
class Rendered:
    """``files``: name -> text; ``start``: commands, to be given in the folder of the files."""

    files: Mapping[str, str]
    start: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Engine:
    """``section``: its keys in models.yaml; ``render(tasks, place, section)``; ``program``: what `start` needs, and
    ``install``: how one comes by it."""

    name: str
    section: type[Section]
    render: Callable[[Sequence[Task], Place, Any], Rendered]
    program: str
    install: str


def label_of(name: str) -> str:
    """A DNS label: small letters, digits and dashes, 60 at most."""
    text = "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower()).strip("-")
    return text[:60].rstrip("-") or "model"


def here_command() -> list[str]:
    """qtool as it runs now, for jobs that see this machine's files."""
    return [sys.executable, "-P", "-m", "qtool"]


def container_script(task: Task) -> str:
    """Shell text for a container that gets the recipe in a variable; it holds no words of strangers."""
    options = shlex.join(task.options("runs"))
    file = f"recipes/{task.name}.yaml"
    return (
        f'set -eu\nmkdir -p {WORK}/recipes\ncd {WORK}\nprintf "%s" "${RECIPE_VARIABLE}" > {file}\n'
        f"exec qtool run {file} {options}\n"
    )
