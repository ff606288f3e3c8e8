"""OLMoE: a mixture of experts in every layer; q and k have a norm over all their heads, which no scale passes."""

from __future__ import annotations

from dataclasses import replace

from qtool import QtoolError
from qtool.convert.models.experts import (
    Mixture,
    check_normalized,
    check_own_head,
    expert_keys,
    mixed_decoder,
    mixture_tensors,
    with_experts,
)
from qtool.convert.models.family import SILU, Family, GgufFacts, Ropes, Settings, Windows
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import decoder_tensors

_MIXTURE = Mixture()
_DEFAULTS = {
    "hidden_act": "silu", "rope_theta": 1e4, "max_position_embeddings": 4096, "num_experts": 64,
    "num_experts_per_tok": 8, "norm_topk_prob": False,
}  # fmt: skip


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    mixed = with_experts(shape, settings, "num_experts", shape.intermediate, (True,) * shape.layers)
    return replace(mixed, head_dim=shape.hidden // shape.heads, clipped_values=settings.get("clip_qkv") is not None)


def _refuse(settings: Settings, rope: Ropes) -> None:
    check_normalized(settings, "olmoe", always=False)
    check_own_head(settings, "olmoe")
    if settings["num_key_value_heads"] != settings["num_attention_heads"]:
        raise QtoolError("config.json: heads share keys and values; llama.cpp's olmoe has one of each for every head.")


OLMOE = Family(
    "OlmoeForCausalLM",
    decoder_tensors(row_norms=True, mlp=mixture_tensors(_MIXTURE)),
    mixed_decoder(_MIXTURE),
    SILU,
    Windows("none"),
    _DEFAULTS,
    aliases={"num_local_experts": "num_experts"},
    shape=_shape,
    mixture=_MIXTURE,
    gguf=GgufFacts(
        "olmoe",
        keys=lambda settings, shape, rope: expert_keys(shape),
        required=("expert_count", "expert_used_count"),
        refuse=_refuse,
        says=frozenset(("num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob")),
    ),
)
