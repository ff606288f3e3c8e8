"""What types cost, as it is kept: a file for each model, text and way to round; and beside it, while a survey is under
way, what it can go on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from qtool.convert.files.chosen import Cost
from qtool.convert.files.durable import set_aside, write_whole
from qtool.quantize.survey import Begun

COSTS, GRADIENTS = "costs", "gradients"


class Measured(BaseModel):
    """What types cost. ``made_from``: a digest of all that decides it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    made_from: str
    costs: dict[str, dict[str, Cost]]


class _Under(BaseModel):
    """Of a survey under way, beside its gradients. ``layer``: as `Begun.layer`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    made_from: str
    layer: int
    costs: dict[str, dict[str, Cost]]


def keeper(path: Path, made_from: str) -> Callable[[Begun], None]:
    """Writes what a survey can go on from, whole or not at all."""

    def keep(begun: Begun) -> None:
        told = _Under(made_from=made_from, layer=begun.layer, costs=begun.costs).model_dump_json().encode()
        tensors = {f"{GRADIENTS}.{number}": one.cpu().contiguous() for number, one in enumerate(begun.gradients)}
        write_whole(path, save({COSTS: torch.frombuffer(bytearray(told), dtype=torch.uint8), **tensors}))

    return keep


def begun_at(path: Path, made_from: str) -> Begun | None:
    """What `keeper` wrote for the same survey; None where there is nothing; of another, or damaged, it is named and set
    aside."""
    if not path.is_file():
        return None
    try:
        tensors = load(path.read_bytes())
        under = _Under.model_validate_json(bytes(tensors.pop(COSTS).tolist()))
    except (OSError, SafetensorError, KeyError, ValidationError, json.JSONDecodeError) as error:
        set_aside(path, str(error).splitlines()[0])
        return None
    if under.made_from != made_from:
        forget(path)
        return None
    gradients = [tensors[f"{GRADIENTS}.{number}"] for number in range(len(tensors))]
    return Begun(under.layer, under.costs, gradients)


def forget(path: Path) -> None:
    """A survey has ended, or nobody will go on with it."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
