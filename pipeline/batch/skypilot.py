"""The engine `skypilot`: a managed job for each model, on whichever cloud has the card.

https://docs.skypilot.co/en/latest/reference/yaml-spec.html
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import yaml
from pydantic import Field

from qtool import QtoolError
from qtool.batch.engine import RECIPE_VARIABLE, SECRET, WORK, Engine, Place, Rendered, Task, container_script
from qtool.recipe.section import Section, Text
from qtool.sizing.accelerators import load_accelerators

NAMES = {  # of qtool's cards, as SkyPilot's catalog calls them
    "RTX3090": "RTX3090", "RTX4090": "RTX4090", "RTX5090": "RTX5090", "L4": "L4", "L40S": "L40S", "A100-40": "A100",
    "A100-80": "A100-80GB", "H100": "H100", "H200": "H200", "B200": "B200", "MI300X": "MI300X",
}  # fmt: skip


class SkypilotSection(Section):
    """`skypilot:` managed jobs. They start again where a spot machine was taken away."""

    infra: Text | None = None
    """Where: `aws`, `gcp/us-central1`, `k8s/my-context`; SkyPilot chooses otherwise."""
    spot: bool = True
    """Machines that may be taken away at any time, and cost less."""
    volume: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = None
    """A SkyPilot volume, which every job finds at /work. Without one, what a machine made goes with it."""


def _render(tasks: Sequence[Task], place: Place, section: SkypilotSection) -> Rendered:
    if place.image is None:
        raise QtoolError("skypilot: needs `image:`, an image in which qtool is (Dockerfile makes one).")
    files, start = {}, []
    for task in tasks:
        name = f"skypilot-{task.name}.yaml"
        told = f"# sky jobs launch {name} --secret {SECRET}. Started again it goes on where it stopped.\n"
        files[name] = told + yaml.safe_dump(_task(task, place.image, section), sort_keys=False, allow_unicode=True)
        start.append(["sky", "jobs", "launch", "--yes", "--async", "--secret", SECRET, name])
    return Rendered(files, start)


def _task(task: Task, image: str, section: SkypilotSection) -> dict[str, Any]:
    needs = task.needs
    resources: dict[str, Any] = {
        "cpus": f"{needs.processors}+", "memory": f"{needs.host_gib}+", "disk_size": max(50, needs.disk_gb + 30),
        "image_id": f"docker:{image}", "use_spot": section.spot,
        "job_recovery": {"max_restarts_on_errors": 3, "recover_on_exit_codes": [137, 143]},
    }  # fmt: skip
    if section.infra:
        resources["infra"] = section.infra
    if needs.card:
        resources["accelerators"] = dict.fromkeys(_cards(task), needs.cards)
    return {
        "name": f"qtool-{task.label}",
        "resources": resources,
        **({"volumes": {WORK: section.volume}} if section.volume else {}),
        "envs": {RECIPE_VARIABLE: task.recipe, "OMP_NUM_THREADS": str(needs.processors)},
        "run": container_script(task),
    }


def _cards(task: Task) -> list[str]:
    """The card that was named, else every NVIDIA card that holds the job: the cheapest one is taken."""
    needs = task.needs
    if needs.card is not None and needs.named:
        if needs.card.key not in NAMES:
            raise QtoolError(f"{task.name}: SkyPilot has no {needs.card.key}; its cards are {', '.join(NAMES)}.")
        return [NAMES[needs.card.key]]
    least = needs.card.memory if needs.card else 0
    return [NAMES[key] for key, card in load_accelerators().items() if card.cuda and key in NAMES
            and card.memory >= least]  # fmt: skip


SKYPILOT = Engine("skypilot", SkypilotSection, _render, "sky", "pip install skypilot, in an environment of its own")
