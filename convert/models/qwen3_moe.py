"""Qwen 3 with mixtures of experts, Qwen3-Coder-30B-A3B and 480B-A35B among them. No expert is shared."""

from __future__ import annotations

from qtool import QtoolError
from qtool.convert.models.experts import (
    Mixture,
    check_all_sparse,
    check_normalized,
    expert_keys,
    mixed_decoder,
    mixture_tensors,
    whole_number,
    with_experts,
)
from qtool.convert.models.family import SILU, Family, GgufFacts, Ropes, Settings, Windows
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import decoder_tensors

_MIXTURE = Mixture()
_DEFAULTS = {
    "hidden_act": "silu", "rope_theta": 1e4, "num_key_value_heads": 4, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "decoder_sparse_step": 1, "moe_intermediate_size": 768,
    "num_experts_per_tok": 8, "num_experts": 128, "norm_topk_prob": False,
}  # fmt: skip


def sparse_layers(settings: Settings, layers: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer, those of `mlp_only_layers` left out. Raises QtoolError for what names no
    layers."""
    named = settings.get("mlp_only_layers") or []
    if not isinstance(named, list) or any(not isinstance(layer, int) for layer in named):
        raise QtoolError(f"config.json: mlp_only_layers is {named!r}; a list of layers is needed.")
    dense, step = set(named), whole_number(settings, "decoder_sparse_step")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    sparse = sparse_layers(settings, shape.layers)
    return with_experts(shape, settings, "num_experts", whole_number(settings, "moe_intermediate_size"), sparse)


def _refuse(settings: Settings, rope: Ropes) -> None:
    check_normalized(settings, "qwen3moe", always=True)
    check_all_sparse(sparse_layers(settings, int(settings["num_hidden_layers"])), "qwen3moe")


QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    decoder_tensors(head_norms=True, mlp=mixture_tensors(_MIXTURE)),
    mixed_decoder(_MIXTURE),
    SILU,
    Windows("all", switched=True),
    _DEFAULTS,
    aliases={"num_local_experts": "num_experts"},
    shape=_shape,
    mixture=_MIXTURE,
    gguf=GgufFacts(
        "qwen3moe",
        keys=lambda settings, shape, rope: expert_keys(shape) | {"expert_feed_forward_length": shape.expert_width},
        required=("expert_count", "expert_used_count", "expert_feed_forward_length"),
        refuse=_refuse,
        says=frozenset((
            "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
            "decoder_sparse_step", "mlp_only_layers",
        )),
    ),
)  # fmt: skip
