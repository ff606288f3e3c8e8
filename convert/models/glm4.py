"""GLM-4, dense: gate and up are one matrix, and half of every head is rotated, in neighbouring pairs; from 0414 on,
norms stand behind attention and MLP too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from qtool.convert.models.family import SILU, Family, GgufFacts, Windows
from qtool.convert.models.feeds import Feed, Shape
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import TWO_NORMS, attention_feeds, decoder_tensors, fused_mlp, fused_tensors

_FOUR_NORMS = (*TWO_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")


def _tensors(norms: Sequence[str]) -> Callable[[Geometry], dict[str, Shape]]:
    def tensors(shape: Geometry) -> dict[str, Shape]:
        of_kind = decoder_tensors(norms, qkv_bias=shape.attention_bias, mlp=fused_tensors)
        return of_kind(replace(shape, attention_bias=False))

    return tensors


def _feeds(adds: bool) -> Callable[[Geometry, int], tuple[Feed, ...]]:
    def feeds(shape: Geometry, layer: int) -> tuple[Feed, ...]:
        return (*attention_feeds(shape, adds=adds), *fused_mlp("post_attention_layernorm", shape, adds=adds))

    return feeds


_DEFAULTS = {
    "hidden_act": "silu", "rope_theta": 1e4, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True,
    "max_position_embeddings": 131072, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-7,
}  # fmt: skip

GLM = Family(
    "GlmForCausalLM",
    _tensors(TWO_NORMS),
    _feeds(adds=True),
    SILU,
    Windows("none"),
    _DEFAULTS,
    shape=lambda settings, shape: replace(shape, attention_bias=bool(settings["attention_bias"])),
    partial_rotary=True,
    gguf=GgufFacts("chatglm", biases=True),
)
GLM4 = replace(
    GLM, name="Glm4ForCausalLM", float16=False, tensors=_tensors(_FOUR_NORMS), feeds=_feeds(adds=False),
    vllm_takes_gptq=False, gguf=GgufFacts("glm4", biases=True),
)  # fmt: skip
