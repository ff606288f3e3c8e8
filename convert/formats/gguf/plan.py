"""What a .gguf file will hold, tensor by tensor, from shapes and config.json alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.writer import Spec
from qtool.convert.formats.gguf.ggml import BLOCKS, FLOATS, load_gguf, row_bytes
from qtool.convert.formats.gguf.metadata import model_keys
from qtool.convert.formats.gguf.names import ROPE_FREQS, gguf_names, stored_shape
from qtool.convert.formats.gguf.types import (
    PLAIN,
    Typed,
    file_type_of,
    mixed_types,
    plain_type,
    tensor_types,
    types_apart,
)
from qtool.convert.formats.plan import QUANTIZED_SHARE, LinearPlan, ModelShape, OutputPlan, walk_order
from qtool.convert.models.config_keys import check_gguf
from qtool.convert.models.expert_names import expert_of, stacked
from qtool.convert.models.rope import rope_factors
from qtool.convert.models.table import gguf_facts


@dataclass(frozen=True)
class GgufPlan(OutputPlan):
    """``names``: HF name -> GGUF name, one for all experts of a layer. ``types``: GGUF name -> type, and what the rule
    wanted before a row's length forced another. ``shapes``: GGUF name -> shape (torch order), in file order.
    ``limits``: what the file is right only up to, a line each. ``file_type``: what the file calls itself."""

    names: dict[str, str] = field(default_factory=dict)
    types: dict[str, Typed] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    file_type: str = ""

    @property
    def notes(self) -> list[str]:
        """The limits, and a line for each kind of tensor that could not get the type of its rule."""
        kinds: dict[tuple[str, int, str, str], int] = {}
        for name, typed in self.types.items():
            if typed.fell_back:
                kind = (re.sub(r"^blk\.\d+\.", "", name), self.shapes[name][-1], typed.wanted, typed.type)
                kinds[kind] = kinds.get(kind, 0) + 1
        return list(self.limits) + [
            f"{kind} ({count} of them): {columns} columns do not divide by {BLOCKS[wanted][0]}: {wanted} -> {given}"
            for (kind, columns, wanted, given), count in kinds.items()
        ]


def plan_gguf(
    shape: ModelShape, file_type: str, asked: Mapping[str, Any] | None = None, mix: Mapping[str, str] | None = None
) -> GgufPlan:
    """``asked``: as `find_apart` takes it; ``mix``: module -> type, of every matrix, embeddings and head among them
    (experts under one name), in place of what ``file_type`` says. Raises QtoolError for an architecture or a tensor
    that llama.cpp does not know, for what config.json says and a .gguf file cannot, and for a model whose rows hardly
    fit a quantized type."""
    load_gguf()  # said first, whatever the model is
    tensors, config = shape.tensors, shape.config
    limits = tuple(check_gguf(config))
    model_keys(config)
    decoder = shape.decoder
    names = gguf_names(walk_order(tensors, decoder), config)
    experts = decoder.shape.experts
    shapes = {name: stored_shape(name, tensors[hf].shape, experts) for hf, name in names.items()}
    factors = rope_factors(config)
    if factors is not None:
        shapes[ROPE_FREQS] = tuple(factors.shape)
    like_70b = gguf_facts(config).like_70b(decoder.shape)
    if mix is None:
        types = tensor_types(shapes, file_type, decoder.shape.layers, like_70b, experts)
    else:
        types = mixed_types(shapes, typed_tensors(names, mix))
    if ROPE_FREQS in types:
        types[ROPE_FREQS] = Typed("F32", "F32")
    types = types_apart(types, shapes, names, asked or {}, plain_type(config))
    _require_share(shapes, types, file_type)
    sizes = {name: _rows(shape) * row_bytes(types[name].type, shape[-1]) for name, shape in shapes.items()}
    plans, outside, held = list[LinearPlan](), list[LinearPlan](), decoder.held()
    for hf, name in names.items():
        kind, columns = types[name].type, shapes[name][-1]
        for module, matrix in held.get(hf, ()):
            out, columns = matrix.shape(tensors[hf].shape)
            plans.append(LinearPlan(module, out, columns, BLOCKS[kind][0], out * row_bytes(kind, columns), kind))
        if hf not in held and kind not in FLOATS:
            module = hf.removesuffix(".weight")
            outside.append(LinearPlan(module, shapes[name][0], columns, BLOCKS[kind][0], sizes[name], kind))
    stored = names | {name: name for name in shapes if name == ROPE_FREQS}
    parts = {hf: 1 if expert_of(hf) is None else experts for hf in stored}
    specs: dict[str, Spec] = {hf: (torch.uint8, (sizes[name] // parts[hf],)) for hf, name in stored.items()}
    tied = [name for name in tensors if name not in names]
    parameters = sum(info.nbytes // info.dtype.itemsize for name, info in tensors.items() if name not in tied)
    total = sum(sizes.values())
    if mix is not None:
        file_type = file_type_of({name: (types[name].type, shape) for name, shape in shapes.items()})
    return GgufPlan(
        specs, plans, parameters, total, outside, names=names, types=types, shapes=shapes, limits=limits,
        file_type=file_type,
    )  # fmt: skip


def offers(shape: ModelShape, types: Sequence[str], others: Sequence[str]) -> dict[str, dict[str, int]]:
    """Module -> type -> bytes: what every matrix, embeddings and head among them, can be stored in: ``types``, or where
    the blocks of some of them do not divide its rows ``others``, as far as they do."""
    plan = plan_gguf(shape, "F16")
    found = {}
    for hf, name in plan.names.items():
        size = plan.shapes[name]
        if plan.types[name].type == "F16":
            whole = all(size[-1] % BLOCKS[kind][0] == 0 for kind in types)
            fitting = [kind for kind in (types if whole else others) if size[-1] % BLOCKS[kind][0] == 0]
            found[module_of(hf)] = {kind: _rows(size) * row_bytes(kind, size[-1]) for kind in fitting}
    return found


def typed_tensors(names: Mapping[str, str], mix: Mapping[str, str]) -> dict[str, str]:
    """GGUF name -> type. ``names``: HF name -> GGUF name; ``mix``: as of `plan_gguf`. Raises QtoolError for a module
    that the model does not have, and for one that is not named."""
    modules = {module_of(hf): name for hf, name in names.items() if hf.endswith(".weight")}
    unknown = [module for module in mix if module not in modules]
    if unknown:
        raise QtoolError(f"mix: names {unknown[0]}, which the model does not have.")
    return {modules[module]: kind for module, kind in mix.items()}


def module_of(tensor: str) -> str:
    """The module that a mix gives a type, all experts of a layer together."""
    return stacked(tensor).removesuffix(".weight")


def _require_share(shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, Typed], file_type: str) -> None:
    """As `verify` will: at least 99 % of the weights that the rules quantize must get a quantized type."""
    meant = [name for name, typed in types.items() if typed.wanted not in PLAIN]
    plain = [name for name in meant if types[name].type in PLAIN]
    total, left = (sum(_rows(shapes[name]) * shapes[name][-1] for name in names) for names in (meant, plain))
    if not meant or 1 - left / total >= QUANTIZED_SHARE:
        return
    columns = ", ".join(map(str, sorted({shapes[name][-1] for name in plain})))
    raise QtoolError(
        f"type: {file_type} would leave {left / total:.1%} of the weights in 16 bits: {plain[0]} and {len(plain) - 1} "
        f"more have rows of {columns} weights, and no quantized type takes rows that 32 does not divide. Take type F16 "
        "or BF16, or another method."
    )


def _rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])
