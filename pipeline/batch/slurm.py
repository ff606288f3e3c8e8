"""The engine `slurm`: job arrays, one for each set of resources, on a file system that all nodes share.

https://slurm.schedmd.com/sbatch.html, https://slurm.schedmd.com/job_array.html
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, field_validator

from qtool.batch.engine import Engine, Place, Rendered, Task, here_command
from qtool.recipe.section import Positive, Section, Text

WARNED = 120  # seconds between SIGTERM and the end: a layer that is being written is written to its end


class SlurmSection(Section):
    """`slurm:` arrays for sbatch. Nodes share this machine's file system, and the Python that qtool runs in."""

    options: tuple[Text, ...] = ()
    """Further options of sbatch, `--partition=gpu`, `--account=mine`."""
    gres: Annotated[str, Field(pattern=r"^[A-Za-z0-9_:.-]{1,80}$")] = "gpu"
    """How the cluster calls its cards, without their number: `gpu`, `gpu:h100`."""
    at_once: Positive | None = None
    """Jobs of an array that run at the same time, at most."""

    @field_validator("options")
    @classmethod
    def _options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [one for one in value if not one.startswith("--") or not one.isprintable()]
        if wrong:
            raise ValueError(f"{wrong[0]!r:.80} is no option of sbatch; write --NAME=VALUE")
        return value


def _render(tasks: Sequence[Task], place: Place, section: SlurmSection) -> Rendered:
    alike: dict[tuple[int, int, int, int | None], list[Task]] = {}
    for task in tasks:
        n = task.needs
        memory = 2 ** math.ceil(math.log2(max(1, n.host_gib)))  # few sizes, few arrays
        alike.setdefault((n.cards if n.card else 0, n.processors, memory, n.seconds), []).append(task)
    files, start = {}, []
    for number, (resources, some) in enumerate(alike.items()):
        name = f"slurm-{number}.sh"
        files[name] = _array(some, resources, place, section)
        start.append(["sbatch", name])
    return Rendered(files, start)


def _array(
    tasks: Sequence[Task], resources: tuple[int, int, int, int | None], place: Place, section: SlurmSection
) -> str:
    cards, processors, memory, seconds = resources
    limit = f"%{section.at_once}" if section.at_once else ""
    told = [
        "--job-name=qtool", f"--array=0-{len(tasks) - 1}{limit}", "--nodes=1", "--ntasks=1",
        f"--cpus-per-task={processors}", f"--mem={memory}G", *([f"--gres={section.gres}:{cards}"] if cards else []),
        *([f"--time={math.ceil((seconds + WARNED) / 60)}"] if seconds else []),
        f"--signal=B:TERM@{WARNED}", "--requeue", "--open-mode=append", "--output=slurm-%A_%a.txt",
        *(shlex.quote(option) for option in section.options),
    ]  # fmt: skip
    first = tasks[0].options(place.runs)[:-1]  # of one array they differ in the last word, the name
    run = shlex.join([*here_command(), "run"])
    folder = shlex.quote(str(place.folder / "recipes"))
    return "\n".join([
        "#!/bin/bash",
        "# sbatch FILE, in this folder. A job that was ended goes on where it stopped: scontrol requeue, or sbatch.",
        *(f"#SBATCH {option}" for option in told),
        "set -eu",
        f"names=({' '.join(task.name for task in tasks)})",
        'name="${names[$SLURM_ARRAY_TASK_ID]}"',
        f"cd {shlex.quote(str(place.home))}",
        'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"',
        f'exec {run} {folder}/"$name".yaml {shlex.join(first)} "$name"',
        "",
    ])  # fmt: skip


SLURM = Engine("slurm", SlurmSection, _render, "sbatch", "see https://slurm.schedmd.com (Debian: slurm-wlm)")
