"""GLM-4.5 and 4.6 with mixtures of experts: a sigmoid router whose choice a bias corrects, a shared expert without a
gate, the first layers dense, half of every head rotated.

Router and bias are computed in float32 and keep their dtype: rounded to 16 bits, close scores change places.
Checkpoints hold layers beyond the last, which guess further tokens; artifacts leave them out.
"""

from __future__ import annotations

from dataclasses import replace

from qtool import QtoolError
from qtool.convert.models.experts import (
    Mixture,
    expert_keys,
    mixed_decoder,
    mixture_tensors,
    whole_number,
    with_experts,
)
from qtool.convert.models.family import SILU, Family, GgufFacts, Ropes, Settings, Value, Windows
from qtool.convert.models.feeds import Shape
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import decoder_tensors

SIGMOID = 2  # of llama.cpp's expert_gating_func
_MIXTURE = Mixture(shared="mlp.shared_experts", score_bias="mlp.gate.e_score_correction_bias")
_DEFAULTS = {
    "hidden_act": "silu", "rope_theta": 1e4, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "partial_rotary_factor": 0.5, "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1,
    "n_routed_experts": 128, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "norm_topk_prob": True, "use_qk_norm": False,
}  # fmt: skip


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    dense, width = whole_number(settings, "first_k_dense_replace", 0), whole_number(settings, "moe_intermediate_size")
    sparse = tuple(layer >= dense for layer in range(shape.layers))
    shared = width * whole_number(settings, "n_shared_experts", 0)
    mixed = with_experts(shape, settings, "n_routed_experts", width, sparse, shared)
    return replace(mixed, head_norms=bool(settings["use_qk_norm"]))


def _tensors(shape: Geometry) -> dict[str, Shape]:
    tensors = decoder_tensors(head_norms=shape.head_norms, qkv_bias=shape.attention_bias, mlp=mixture_tensors(_MIXTURE))
    return tensors(replace(shape, attention_bias=False))


def _keys(settings: Settings, shape: Geometry, rope: Ropes) -> dict[str, Value]:
    return expert_keys(shape) | {
        "expert_feed_forward_length": shape.expert_width,
        "expert_shared_count": int(settings["n_shared_experts"]),
        "expert_weights_scale": float(settings["routed_scaling_factor"]),
        "expert_weights_norm": bool(settings["norm_topk_prob"]),
        "expert_gating_func": SIGMOID,
        "leading_dense_block_count": int(settings["first_k_dense_replace"]),
    }


def _refuse(settings: Settings, rope: Ropes) -> None:
    if (settings["n_group"], settings["topk_group"]) != (1, 1):
        raise QtoolError(
            f"config.json: n_group is {settings['n_group']}; llama.cpp's glm4moe chooses among all experts."
        )
    if not settings["n_shared_experts"]:
        raise QtoolError("config.json: n_shared_experts is 0; llama.cpp's glm4moe always adds a shared expert.")


GLM4_MOE = Family(
    "Glm4MoeForCausalLM",
    _tensors,
    mixed_decoder(_MIXTURE),
    SILU,
    Windows("none"),
    _DEFAULTS,
    aliases={"num_local_experts": "n_routed_experts"},
    shape=_shape,
    mixture=_MIXTURE,
    uncast=(_MIXTURE.router, _MIXTURE.score_bias),
    partial_rotary=True,
    drafts=True,
    gguf=GgufFacts(
        "glm4moe",
        biases=True,
        keys=_keys,
        required=("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_count"),
        refuse=_refuse,
        says=frozenset((
            "n_routed_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
            "n_shared_experts", "routed_scaling_factor", "first_k_dense_replace", "n_group", "topk_group",
            "use_qk_norm", "num_nextn_predict_layers", "num_mtp_layers",
        )),
    ),
)  # fmt: skip
