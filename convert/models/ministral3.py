"""Ministral 3 and Devstral Small 2: Mistral whose queries grow with the logarithm of their position, as Llama 4's do.

The growth multiplies all channels of a query alike, after the rotation: no scale of a matrix changes by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool import QtoolError
from qtool.convert.models.family import FULL, SILU, Family, GgufFacts, Ropes, Settings, Value, Windows
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import decoder_tensors, gated_decoder

BETA = "llama_4_scaling_beta"
_ROPE = {
    "type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, BETA: 0.1,
}  # fmt: skip


def _rope(settings: Settings) -> Any:
    """The rotary settings that transformers' class reads; null is its own, as a key left out is."""
    return settings.get("rope_scaling") or settings.get("rope_parameters") or _ROPE


def _beta(settings: Settings) -> float:
    """By how much queries grow. Raises QtoolError where the rotary settings do not say it."""
    rope = _rope(settings)
    said = rope.get(BETA) if isinstance(rope, Mapping) else None
    if isinstance(said, bool) or not isinstance(said, int | float):
        raise QtoolError(f"config.json: {BETA} of rope_parameters is {said!r}; a number is needed.")
    return float(said)


def _keys(settings: Settings, shape: Geometry, rope: Ropes) -> dict[str, Value]:
    return {"attention.temperature_scale": _beta(settings)}


def _refuse(settings: Settings, rope: Ropes) -> None:
    if _beta(settings) and "scaling.original_context_length" not in rope[FULL]:
        raise QtoolError("config.json: the rotary settings are not yarn's; llama.cpp's mistral3 takes from them the "
                         "length in which queries grow.")  # fmt: skip


def _for_vllm(settings: Settings) -> dict[str, Any]:
    """vLLM 0.32 looks for the growth where Mistral's own files say it, and without it computes none: in silence, from
    the length on that the rotary settings are stretched from."""
    rope = _rope(settings)
    length = rope.get("original_max_position_embeddings")
    return (
        {}
        if length is None
        else {"llama_4_scaling": {"original_max_position_embeddings": length, "beta": _beta(settings)}}
    )


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    _beta(settings)  # without it transformers builds the model and cannot run it
    return shape


MINISTRAL3 = Family(
    "Ministral3ForCausalLM",
    decoder_tensors(),
    gated_decoder(),
    SILU,
    Windows("all"),
    {
        "hidden_act": "silu", "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
        "rope_parameters": _ROPE,
    },
    shape=_shape,
    runtime_keys=_for_vllm,
    gguf=GgufFacts(
        "mistral3",
        permuted=True,
        biases=True,
        own_yarn=True,
        keys=_keys,
        required=("attention.temperature_scale",),
        refuse=_refuse,
    ),
)  # fmt: skip
