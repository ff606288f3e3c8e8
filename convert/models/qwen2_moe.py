"""Qwen 2 with mixtures of experts and a shared expert behind a gate (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B)."""

from __future__ import annotations

from dataclasses import replace

from qtool import QtoolError
from qtool.convert.models.experts import (
    Mixture,
    check_all_sparse,
    check_normalized,
    check_own_head,
    expert_keys,
    mixed_decoder,
    mixture_tensors,
    whole_number,
    with_experts,
)
from qtool.convert.models.family import SILU, Family, GgufFacts, Ropes, Settings, Value
from qtool.convert.models.feeds import Shape
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import decoder_tensors
from qtool.convert.models.qwen2 import WINDOWS
from qtool.convert.models.qwen3_moe import sparse_layers

_MIXTURE = Mixture(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate.weight")
_DEFAULTS = {
    "hidden_act": "silu", "rope_theta": 1e4, "num_key_value_heads": 16, "max_position_embeddings": 32768,
    "sliding_window": 4096, "max_window_layers": 28, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": False,
    "qkv_bias": True,
}  # fmt: skip


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    if settings.get("use_sliding_window") and settings.get("layer_types") is None:
        # transformers' class takes every second layer then, vLLM's none
        raise QtoolError("config.json: use_sliding_window is true, and no layer_types say which layers slide.")
    mixed = with_experts(
        shape,
        settings,
        "num_experts",
        whole_number(settings, "moe_intermediate_size"),
        sparse_layers(settings, shape.layers),
        whole_number(settings, "shared_expert_intermediate_size"),
    )
    return replace(mixed, attention_bias=bool(settings["qkv_bias"]))


def _tensors(shape: Geometry) -> dict[str, Shape]:
    plain = replace(shape, attention_bias=False)
    return decoder_tensors(qkv_bias=shape.attention_bias, mlp=mixture_tensors(_MIXTURE))(plain)


def _keys(settings: Settings, shape: Geometry, rope: Ropes) -> dict[str, Value]:
    widths = {"expert_feed_forward_length": shape.expert_width, "expert_shared_feed_forward_length": shape.shared_width}
    return expert_keys(shape) | widths


def _refuse(settings: Settings, rope: Ropes) -> None:
    check_normalized(settings, "qwen2moe", always=False)
    check_own_head(settings, "qwen2moe")
    check_all_sparse(sparse_layers(settings, int(settings["num_hidden_layers"])), "qwen2moe")


QWEN2_MOE = Family(
    "Qwen2MoeForCausalLM",
    _tensors,
    mixed_decoder(_MIXTURE),
    SILU,
    WINDOWS,
    _DEFAULTS,
    aliases={"num_local_experts": "num_experts"},
    shape=_shape,
    mixture=_MIXTURE,
    gguf=GgufFacts(
        "qwen2moe",
        biases=True,
        keys=_keys,
        required=("expert_count", "expert_used_count"),
        refuse=_refuse,
        says=frozenset((
            "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
            "decoder_sparse_step", "mlp_only_layers", "shared_expert_intermediate_size", "qkv_bias",
        )),
    ),
)  # fmt: skip
