"""Checkpoints whose experts lie in one tensor for all: read as if each lay alone, an expert's bytes at a time.

transformers 5 writes such with ``save_pretrained(save_original_format=False)``, training code its own. Two layouts:

    as in memory                                     transposed
    mlp.experts.gate_up_proj  [E, 2I, h]             [E, h, 2I]     gate first, then up
    mlp.experts.down_proj     [E, h, I]              [E, I, h]

Every other tensor of the block is then called as in memory too (of Mixtral the router: `mlp.gate.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.config_file import read_config, read_stored_config
from qtool.convert.files.decoded import in_16_bits
from qtool.convert.files.tensor_info import TensorInfo
from qtool.convert.files.wrapped_tensors import text_names
from qtool.convert.models.experts import BLOCK, DOWN_STACK, GATE_UP, Mixture
from qtool.convert.models.feeds import Shape
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.shape import Decoder, decoder_of
from qtool.convert.models.table import find_family


def open_model(folder: Path) -> Checkpoint:
    """A folder's weights, in 16 bits where they are stored in fewer, each expert alone. Raises QtoolError as
    `Checkpoint.open`, `in_16_bits` and `each_alone` do."""
    checkpoint = Checkpoint.open(folder)
    return checkpoint.holding(as_read(checkpoint.tensors, folder))


def as_read(tensors: Mapping[str, TensorInfo], folder: Path) -> dict[str, TensorInfo]:
    """Stored tensors under the names that artifacts have, in 16 bits. Raises QtoolError as `in_16_bits` and
    `each_alone` do."""
    config = read_config(folder)
    return each_alone(in_16_bits(text_names(tensors, read_stored_config(folder)), config), config)


def each_alone(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Stored tensors under the names that artifacts have, each expert alone.

    Raises QtoolError naming a fused tensor whose shape is neither layout's, or an expert that is stored twice.
    """
    family = find_family(config)
    if family is None or family.mixture is None:
        return dict(tensors)
    fused = re.compile(rf"({re.escape(family.prefix)}\d+\.){re.escape(BLOCK)}\.experts\.(gate_up_proj|down_proj)")
    layers = dict.fromkeys(found[1] for name in tensors if (found := fused.fullmatch(name)))
    if not layers:
        return dict(tensors)
    decoder = decoder_of(config)
    divided = dict(tensors)
    for at in layers:
        _divide(at, divided, family.mixture, decoder)
    return dict(sorted(divided.items()))


def _divide(at: str, found: dict[str, TensorInfo], mixture: Mixture, decoder: Decoder) -> None:
    """Replace a layer's fused tensors. ``at``: its prefix."""
    shape = decoder.shape
    stacks = {name: found.pop(at + name) for name in (GATE_UP, DOWN_STACK) if at + name in found}
    transposed = _is_transposed(at, stacks, shape)
    parts = {"gate": (GATE_UP, 0), "up": (GATE_UP, shape.expert_width), "down": (DOWN_STACK, 0)}
    alone: dict[str, TensorInfo] = {}
    for part, (stack, first) in parts.items():
        if (info := stacks.get(stack)) is None:
            continue  # its absence is named where shapes are checked
        size = (shape.hidden, shape.expert_width) if part == "down" else (shape.expert_width, shape.hidden)
        for expert in range(shape.experts):
            alone[f"{at}{mixture.module(expert, part)}.weight"] = info.expert(
                at + stack, expert, first, size, transposed
            )
    if twice := next((name for name in alone if name in found), None):
        raise QtoolError(
            f"{found[twice].file}: holds {twice}, which {alone[twice].file.name} holds as a part of all experts' "
            "tensor too. Which one is the model's cannot be told: remove one of them."
        )
    found |= alone
    for name in [name for name in found if name.startswith(f"{at}{BLOCK}.")]:
        filed = at + mixture.in_files(name.removeprefix(at))
        if filed != name:
            found[filed] = found.pop(name).named(name)


def _is_transposed(at: str, stacks: Mapping[str, TensorInfo], shape: Geometry) -> bool:
    """Whether a layer's fused tensors hold ``[in, out]``. Where one tensor is square, the other tells. Raises
    QtoolError naming one that fits neither layout."""
    layouts = _layouts(shape)
    for name, info in stacks.items():
        if info.shape not in layouts[name]:
            plain, other = map(list, layouts[name])
            raise QtoolError(
                f"{info.file}: {at}{name} has shape {list(info.shape)}, but config.json implies {plain}, or {other} "
                "where experts are transposed. Weights and config.json are not of one model."
            )
    turnable = all(info.small is None for info in stacks.values())  # packed rows lie as they are multiplied
    for turned in (False, True) if turnable else (False,):
        if all(info.shape == layouts[name][turned] for name, info in stacks.items()):
            return turned
    said = " and ".join(f"{at}{name} {list(info.shape)}" for name, info in stacks.items())
    raise QtoolError(f"{stacks[GATE_UP].file}: holds {said}: one of them is transposed, the other is not.")


def _layouts(shape: Geometry) -> dict[str, tuple[Shape, Shape]]:
    """Of each fused tensor its shape as in memory, and transposed."""
    count, hidden, inner = shape.experts, shape.hidden, shape.expert_width
    return {
        GATE_UP: ((count, 2 * inner, hidden), (count, hidden, 2 * inner)),
        DOWN_STACK: ((count, hidden, inner), (count, inner, hidden)),
    }
