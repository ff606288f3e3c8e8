"""Rotary settings of config.json as llama.cpp's keys, and what it computes from them.

Facts: llama.cpp ggml/src/ggml.c (`ggml_rope_yarn_corr_dims`, `rope_yarn`). Of the scaling keys its
common loader reads type, factor, original_context_length and attn_factor; the yarn_* ones are those of other
architectures (grok, mistral3, deepseek2), and a file of ours must not rely on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.models.family import FULL, Value
from qtool.convert.models.model_config import completed, head_dim, rope_parameters
from qtool.convert.models.table import find_family

KINDS = ("default", "linear", "yarn", "llama3")
NUMBERS = {  # what each variant of transformers cannot do without
    "default": (), "proportional": (), "linear": ("factor",), "dynamic": ("factor",),
    "yarn": ("original_max_position_embeddings",), "longrope": ("original_max_position_embeddings",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip
OPTIONAL = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
BETA_FAST, BETA_SLOW = 32, 1  # llama.cpp's own, which keys of few architectures change (`GgufFacts.own_yarn`)
LOG_MULTIPLIER = "scaling.yarn_log_multiplier"  # of such: the magnitude is divided by 1 + 0.1 * it * ln(factor)


def check_rope(config: Mapping[str, Any], kind: str = FULL) -> None:
    """Raises QtoolError for rotary settings that transformers cannot compute with, and for what other runtimes read
    otherwise than it does."""
    rope = rope_parameters(config, kind)
    variant = rope["rope_type"]
    if variant not in NUMBERS:
        raise QtoolError(
            f"config.json: rotary scaling {variant!r} is none that transformers has: {', '.join(NUMBERS)}."
        )
    if "type" in rope and rope["type"] not in (None, variant):
        raise QtoolError(f"config.json: the rotary settings say type {rope['type']!r} and rope_type {variant!r}; "
                         "remove the one that is not meant.")  # fmt: skip
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    family = find_family(config)
    if part not in (None, 1) and not (family and family.partial_rotary):
        raise QtoolError(f"config.json: partial_rotary_factor is {part!r}; vLLM follows it, transformers' code of this "
                         "architecture does not.")  # fmt: skip
    for key in ("rope_theta", *NUMBERS[variant]):
        _positive(rope, key)
    for key in OPTIONAL if variant == "yarn" else ():  # null or 0: not given
        if rope.get(key) not in (None, 0) or (key in ("factor", "attention_factor") and rope.get(key) == 0):
            _positive(rope, key)


def rotary_dim(config: Mapping[str, Any]) -> int:
    """Numbers of a head that are rotated. Raises QtoolError where that is no even part of it."""
    part = rope_parameters(config).get("partial_rotary_factor")
    whole = head_dim(config)
    if part is None:
        return whole
    dim = int(whole * part) if isinstance(part, int | float) and 0 < part <= 1 else 0
    if dim < 2 or dim % 2:
        raise QtoolError(f"config.json: partial_rotary_factor is {part!r}, of heads of {whole} numbers.")
    return dim


def rope_keys(config: Mapping[str, Any], kind: str = FULL) -> dict[str, Value]:
    """Keys below `rope.` that make llama.cpp rotate as transformers does. Raises QtoolError naming the setting that no
    key can say, or that is no number it could be."""
    rope = rope_parameters(config, kind)
    variant = rope["rope_type"]
    if variant not in KINDS:
        why = (
            "llama.cpp takes its short or its long factors by the context that a server is started with, transformers "
            "by the length of each text"
            if variant == "longrope"
            else f"{', '.join(KINDS)} can"
        )
        raise QtoolError(f"config.json: rotary scaling {variant!r} cannot be written as GGUF; {why}.")
    keys: dict[str, Value] = {"freq_base": _positive(rope, "rope_theta")}
    if variant == "linear":
        return keys | {"scaling.type": "linear", "scaling.factor": _positive(rope, "factor")}
    if variant != "yarn":  # llama3's factors are a tensor of their own
        return keys
    original = _positive(rope, "original_max_position_embeddings")
    factor = rope.get("factor")
    factor = _positive(rope, "factor") if factor is not None else _longest(config) / original
    if factor < 1:
        raise QtoolError(f"config.json: rotary scaling yarn by {factor:g}, which is below 1: nothing is stretched.")
    family = find_family(config)
    own = family is not None and family.gguf is not None and family.gguf.own_yarn
    betas = {"beta_fast": BETA_FAST, "beta_slow": BETA_SLOW}
    for key, fixed in betas.items():
        if (rope.get(key) or fixed) != fixed and not own:
            raise QtoolError(f"config.json: {key} of the rotary scaling is {rope[key]!r}; llama.cpp always takes "
                             f"{fixed} and no key of a GGUF file says otherwise.")  # fmt: skip
    if not rope.get("truncate", True):
        raise QtoolError("config.json: truncate of the rotary scaling is false; llama.cpp always rounds the range that "
                         "yarn blends over, and no key of a GGUF file says otherwise.")  # fmt: skip
    if original != int(original):
        raise QtoolError(f"config.json: original_max_position_embeddings is {original}; GGUF needs a whole number.")
    magnitude = _magnitude(rope, factor)
    usual = 1 + 0.1 * math.log(factor)  # llama.cpp multiplies by it whatever the file says
    keys |= {"scaling.type": "yarn", "scaling.factor": factor, "scaling.original_context_length": int(original)}
    if own:
        keys |= {f"scaling.yarn_{key}": float(rope.get(key) or fixed) for key, fixed in betas.items()}
        return keys | {LOG_MULTIPLIER: (usual / magnitude - 1) / (usual - 1) if factor > 1 else 0.0}
    return keys if math.isclose(magnitude, usual) else keys | {"scaling.attn_factor": magnitude / usual}


def ropes(config: Mapping[str, Any]) -> dict[str, dict[str, Value]]:
    """Kind of layers -> `rope_keys`, of the kinds that have settings of their own in this family."""
    family = find_family(config)
    return {kind: rope_keys(config, kind) for kind in (family.rope_kinds if family else (FULL,))}


def rope_factors(config: Mapping[str, Any]) -> torch.Tensor | None:
    """`rope_freqs.weight`, float32 ``[head_dim / 2]``: what llama-3 scaling divides each frequency by; None without.

    Llama 3.1's rule (transformers modeling_rope_utils.py, `_compute_llama3_parameters`)."""
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    base, factor, context = (_positive(rope, k) for k in ("rope_theta", "factor", "original_max_position_embeddings"))
    low, high = (_positive(rope, key) for key in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise QtoolError(f"config.json: low_freq_factor {low:g} of the rotary scaling is not below high_freq_factor "
                         f"{high:g}.")  # fmt: skip
    dim = head_dim(config)
    lengths = 2 * math.pi * base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    smooth = (context / lengths - low) / (high - low)
    factors = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(lengths > context / low, factor, torch.where(lengths < context / high, 1.0, factors))
    return factors.float()


def rotation(
    keys: Mapping[str, Value], dim: int, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:  # fmt: skip
    """(radians a position, float64 ``[dim / 2]``; what cosines and sines are multiplied by), as llama.cpp computes them
    from a file with ``keys`` (`rope_keys`) and ``factors`` (`rope_freqs.weight`)."""
    base = float(keys["freq_base"])
    index = torch.arange(dim // 2, dtype=torch.float64)
    radians = base ** (-2 * index / dim) / (1 if factors is None else factors.double())
    factor = float(keys.get("scaling.factor", 1.0))
    if keys.get("scaling.type") == "linear":
        return radians / factor, 1.0
    if keys.get("scaling.type") != "yarn":
        return radians, 1.0

    def bound(turns: float) -> float:
        length = float(keys["scaling.original_context_length"])
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    fast, slow = (float(keys.get(f"scaling.yarn_{key}", usual)) for key, usual in
                  (("beta_fast", BETA_FAST), ("beta_slow", BETA_SLOW)))  # fmt: skip
    low, high = max(0.0, math.floor(bound(fast))), min(dim - 1.0, math.ceil(bound(slow)))
    ramp = 1 - ((index - low) / max(0.001, high - low)).clamp(0, 1)
    magnitude = float(keys.get("scaling.attn_factor", 1.0)) * (1 + 0.1 * math.log(factor))
    magnitude /= 1 + float(keys.get(LOG_MULTIPLIER, 0.0)) * 0.1 * math.log(factor)
    return radians / factor * (1 - ramp) + radians * ramp, magnitude


def _magnitude(rope: Mapping[str, Any], factor: float) -> float:
    """transformers' attention_factor: the one given, or from both mscales, or from the factor alone."""
    if rope.get("attention_factor") is not None:
        return _positive(rope, "attention_factor")

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(_positive(rope, "mscale")) / scale(_positive(rope, "mscale_all_dim"))
    return scale(1)


def _longest(config: Mapping[str, Any]) -> float:
    return _positive(completed(config), "max_position_embeddings", "")


def _positive(rope: Mapping[str, Any], key: str, of: str = " of the rotary settings") -> float:
    value = rope.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise QtoolError(f"config.json: {key}{of} is {value!r}; a number above 0 is needed.")
    return float(value)
