"""GLM-4 0414, dense: gate and up are one matrix, norms stand behind attention and MLP too, and half of every head is
rotated, in neighbouring pairs."""

from __future__ import annotations

from dataclasses import replace

from qtool.convert.models.family import SILU, Family, GgufFacts, Windows
from qtool.convert.models.feeds import Feed, Shape
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import TWO_NORMS, attention_feeds, decoder_tensors, fused_mlp, fused_tensors

_FOUR_NORMS = (*TWO_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")


def _tensors(shape: Geometry) -> dict[str, Shape]:
    return decoder_tensors(_FOUR_NORMS, qkv_bias=shape.attention_bias, mlp=fused_tensors)(
        replace(shape, attention_bias=False)
    )


def _feeds(shape: Geometry, layer: int) -> tuple[Feed, ...]:
    return (*attention_feeds(shape, adds=False), *fused_mlp("post_attention_layernorm", shape, adds=False))


GLM4 = Family(
    "Glm4ForCausalLM",
    _tensors,
    _feeds,
    SILU,
    Windows("none"),
    {
        "hidden_act": "silu", "rope_theta": 1e4, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True,
        "max_position_embeddings": 131072, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-7,
    },
    shape=lambda settings, shape: replace(shape, attention_bias=bool(settings["attention_bias"])),
    partial_rotary=True,
    gguf=GgufFacts("glm4", biases=True),
)  # fmt: skip
