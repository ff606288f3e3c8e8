"""The engine `huggingface`: Jobs of the Hub, by the command line that comes with huggingface_hub.

https://huggingface.co/docs/huggingface_hub/guides/jobs
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from qtool import QtoolError
from qtool.batch.engine import RECIPE_VARIABLE, SECRET, WORK, Engine, Place, Rendered, Task, container_script
from qtool.recipe.section import Positive, Section
from qtool.sizing.accelerators import load_accelerators

FILE = "huggingface.sh"
FLAVORS = {  # flavor -> card and how many, the cheaper first; huggingface_hub's JobHardware (`hf jobs hardware`)
    "l4x1": ("L4", 1), "l4x4": ("L4", 4), "l40sx1": ("L40S", 1), "l40sx4": ("L40S", 4), "l40sx8": ("L40S", 8),
    "a100-large": ("A100-80", 1), "a100x4": ("A100-80", 4), "a100x8": ("A100-80", 8),
    "rtx-pro-6000": ("RTXPRO6000", 1), "rtx-pro-6000x2": ("RTXPRO6000", 2), "rtx-pro-6000x4": ("RTXPRO6000", 4),
    "rtx-pro-6000x8": ("RTXPRO6000", 8),
    "h200": ("H200", 1), "h200x2": ("H200", 2), "h200x4": ("H200", 4), "h200x8": ("H200", 8),
}  # fmt: skip
LONGEST = 86400  # seconds: said always, for the Hub ends a job after half an hour otherwise
PROCESSORS = {"cpu-basic": 16, "cpu-upgrade": 32}  # GB of memory
Plain = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]


class HuggingfaceSection(Section):
    """`huggingface:` Jobs of the Hub."""

    namespace: Plain | None = None
    """Whose jobs they are: an organization, where it is not you."""
    bucket: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """A bucket, NAME/BUCKET, which every job finds at /work. Without one, a job's machine takes what it made with
    it."""
    attempts: Positive = 3
    """Of a job that failed."""


def _render(tasks: Sequence[Task], place: Place, section: HuggingfaceSection) -> Rendered:
    if place.image is None:
        raise QtoolError("huggingface: needs `image:`, an image in which qtool is (Dockerfile makes one).")
    lines = [
        "#!/bin/sh", f"# A job a model, by `hf`. {SECRET} is your login's: its name stands here, its value nowhere.",
        "# Started again, a job goes on where it stopped.", "set -e",
    ]  # fmt: skip
    for task in tasks:
        lines += ["", shlex.join(command(task, place.image, section))]
    return Rendered({FILE: "\n".join(lines) + "\n"}, [["sh", FILE]])


def command(task: Task, image: str, section: HuggingfaceSection) -> list[str]:
    """`hf jobs run` for a model."""
    words = ["hf", "jobs", "run", "--detach", "--name", f"qtool-{task.label}", "--flavor", flavor_of(task)]
    words += ["--attempts", str(section.attempts), "--secrets", SECRET, "--env", f"{RECIPE_VARIABLE}={task.recipe}"]
    words += ["--timeout", f"{task.needs.seconds or LONGEST}s"]
    words += ["--namespace", section.namespace] if section.namespace else []
    words += ["--volume", f"hf://buckets/{section.bucket}:{WORK}"] if section.bucket else []
    return [*words, image, "sh", "-c", container_script(task)]


def flavor_of(task: Task) -> str:
    """The first that has the card, or one as large. Raises QtoolError where there is none."""
    needs, known = task.needs, load_accelerators()
    if needs.card is None:
        for name, memory in PROCESSORS.items():
            if needs.host_bytes <= memory * 1e9:
                return name
        raise QtoolError(f"{task.name}: {needs.host_gib} GiB of host memory; no flavor without a card has as much.")
    for name, (key, count) in FLAVORS.items():
        same = key == needs.card.key if needs.named else known[key].memory >= needs.card.memory
        if same and count == needs.cards:
            return name
    said = ", ".join(f"{count} x {key}" for key, count in FLAVORS.values())
    raise QtoolError(f"{task.name}: the Hub has no {needs.cards} x {needs.card.key}; there are {said}.")


HUGGINGFACE = Engine("huggingface", HuggingfaceSection, _render, "hf", "pip install huggingface_hub")
