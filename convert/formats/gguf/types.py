"""Which ggml type each tensor of a .gguf file gets: llama.cpp's own rules, as pure functions of names and shapes.

Source: llama.cpp src/llama-quant.cpp (llama_tensor_get_type_impl, tensor_allows_quantization); sizes computed by them
match `llama-quantize --dry-run` (see tests).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool import QtoolError
from qtool.convert.formats.apart import find_apart, require_alike
from qtool.convert.formats.gguf.ggml import BLOCKS

FILE_TYPES = {  # name -> general.file_type (llama.h, llama_ftype)
    "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_S": 14,
    "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32,
}  # fmt: skip
MOSTLY = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # what a file of that type is called, else as the type
PLAIN = ("F16", "BF16", "F32")
BASE = {"Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K"}
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # where 256 does not divide a row
ROUTER = "ffn_gate_inp.weight"  # never quantized
DOWN = ("ffn_down.weight", "ffn_down_exps.weight", "ffn_down_shexp.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")


Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor -> (type, shape in torch order)."""


@dataclass(frozen=True)
class Typed:
    """One tensor's type; ``wanted``: what the rule said before a row's length forced another one."""

    type: str
    wanted: str

    @property
    def fell_back(self) -> bool:
        return self.type != self.wanted


def tensor_types(
    shapes: Mapping[str, tuple[int, ...]], file_type: str, layers: int, like_70b: bool = False, experts: int = 0
) -> dict[str, Typed]:
    """GGUF tensor name -> type. ``shapes``: torch order, in file order. ``like_70b``: of what it takes for a
    "70B", llama.cpp keeps attn_v at 5 bits or more. ``experts``: of a layer; with 8 it takes the model for Mixtral,
    whose attention is small beside them, and gives that more bits.
    """
    tied = "output.weight" not in shapes
    found = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or not name.endswith("weight") or name.endswith(("_norm.weight", ROUTER)):
            found[name] = Typed("F32", "F32")
            continue
        wanted = _mixtral(name, file_type) if experts == 8 else None
        wanted = wanted or _rule(name, file_type, layers, tied, like_70b)
        found[name] = Typed(_fitting(wanted, shape[-1]), wanted)
    return found


def types_apart(
    types: Mapping[str, Typed],
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    asked: Mapping[str, Any],
    plain: str,
) -> dict[str, Typed]:
    """The types that an output asks for, beside those of the rules. ``types``, ``shapes``: of GGUF names; ``names``: HF
    name -> GGUF name; ``asked``: as `find_apart` takes it; ``plain``: the type of what stays in 16 bits.

    Raises QtoolError for a type that rows do not fit, and for experts of one tensor that are to differ.
    """
    tensors = {hf.removesuffix(".weight"): name for hf, name in names.items() if types[name].wanted != "F32"}
    apart = find_apart(asked, list(tensors))
    together: dict[str, list[str]] = {}
    for linear, name in tensors.items():
        together.setdefault(name, []).append(linear)
    require_alike(apart, together.values(), "llama.cpp has them in one tensor, which is of one type")
    found = dict(types)
    for linear, settings in apart.items():
        name, kind = tensors[linear], plain if settings is None else settings["type"]
        if shapes[name][-1] % BLOCKS[kind][0]:
            raise QtoolError(
                f"modules: {linear} has rows of {shapes[name][-1]} weights, and {kind} takes blocks of "
                f"{BLOCKS[kind][0]}. Take another type for it."
            )
        found[name] = Typed(kind, kind)
    return found


def plain_type(config: Mapping[str, Any]) -> str:
    """Of what stays in 16 bits: as the model's own weights are."""
    said = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return "BF16" if said == "bfloat16" else "F16"


def mixed_types(shapes: Mapping[str, tuple[int, ...]], mix: Mapping[str, str]) -> dict[str, Typed]:
    """As `tensor_types`, where ``mix`` names the type of every tensor that a rule would quantize. Raises
    QtoolError where it names none."""
    ruled = tensor_types(shapes, "F16", 0)
    if lacking := [name for name, typed in ruled.items() if typed.type != "F32" and name not in mix]:
        raise QtoolError(f"mix: gives {lacking[0]} no type.")
    for name, kind in mix.items():
        if kind in BLOCKS and shapes[name][-1] % BLOCKS[kind][0]:
            raise QtoolError(f"mix: {name} has rows of {shapes[name][-1]} weights, which {kind} does not take.")
    return {name: typed if typed.type == "F32" else Typed(mix[name], mix[name]) for name, typed in ruled.items()}


def file_type_of(layout: Layout) -> str:
    """What a file of mixed types calls itself: by the type that most of its weights have."""
    weights: dict[str, int] = {}
    for kind, shape in layout.values():
        if kind != "F32":
            weights[kind] = weights.get(kind, 0) + math.prod(shape)
    kind = max(sorted(weights), key=lambda one: weights[one], default="F16")
    return MOSTLY.get(kind, kind)


def _rule(name: str, file_type: str, layers: int, tied: bool, like_70b: bool) -> str:
    base = BASE.get(file_type, file_type)
    if base in ("F16", "BF16", "Q8_0"):
        return base
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q6_K"
    layer = _LAYER.match(name)
    if layer is None or base == "Q6_K":
        return base
    number = int(layer.group(1))
    if name.endswith("attn_v.weight"):
        return _attention_value(number, file_type, base, layers, like_70b)
    if name.endswith(DOWN):
        if file_type in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if use_more_bits(number, layers) else base
        if file_type == "Q4_K_S" and number < layers // 8:
            return "Q5_K"
    return base


def _mixtral(name: str, file_type: str) -> str | None:
    """What 8 experts change."""
    if file_type not in PLAIN and name.endswith(("attn_v.weight", "attn_k.weight")):
        return "Q8_0"
    return "Q5_K" if name.endswith("attn_output.weight") and file_type in ("Q4_K_S", "Q4_K_M") else None


def _attention_value(number: int, file_type: str, base: str, layers: int, like_70b: bool) -> str:
    wanted = base
    if file_type in ("Q4_K_M", "Q5_K_M") and use_more_bits(number, layers):
        wanted = "Q6_K"
    elif file_type == "Q4_K_S" and number < 4:
        wanted = "Q5_K"
    return "Q5_K" if like_70b and wanted == "Q4_K" else wanted


def use_more_bits(number: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return number < layers // 8 or number >= 7 * layers // 8 or (number - layers // 8) % 3 == 2


def _fitting(wanted: str, columns: int) -> str:
    if columns % BLOCKS[wanted][0] == 0:
        return wanted
    smaller = FALLBACK.get(wanted, "F16")
    return smaller if columns % BLOCKS[smaller][0] == 0 else "F16"
