"""Checkpoints with all experts of a layer in two tensors, made of those that hold each alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.models.experts import DOWN_STACK, GATE_UP
from qtool.convert.models.shape import decoder_of


def fused_tensors(model: Path, transposed: bool) -> dict[str, Tensor]:
    """Those of a whole model, named as transformers names them in memory."""
    checkpoint, decoder = Checkpoint.open(model), decoder_of(json.loads((model / "config.json").read_text()))
    found = {name: t for name, t in checkpoint.read() if decoder.layer_of(name) is None}
    for layer in range(decoder.shape.layers):
        at = decoder.at(layer)
        held = {name.removeprefix(at): t for name, t in checkpoint.read() if name.startswith(at)}
        found |= {at + name: tensor for name, tensor in decoder.in_memory(held).items()}
    if transposed:
        found |= {name: t.mT for name, t in found.items() if name.endswith((GATE_UP, DOWN_STACK))}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def fused_copy(model: Path, folder: Path, transposed: bool = False, tensors: dict[str, Tensor] | None = None) -> Path:
    """A model's folder with fused experts, or with these ``tensors``."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    held = fused_tensors(model, transposed) if tensors is None else tensors
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
