"""Hunyuan of Tencent with mixtures of experts: Hunyuan-A13B, whose norms of q and k come after the rotation, and Hy3, a
sigmoid router with a bias beside Qwen's attention. Both have a shared expert without a gate."""

from __future__ import annotations

from typing import Any

from qtool import QtoolError
from qtool.convert.models.experts import (
    Mixture,
    check_own_head,
    expert_keys,
    mixed_decoder,
    mixture_tensors,
    whole_number,
    with_experts,
)
from qtool.convert.models.family import SILU, Family, GgufFacts, Ropes, Settings, Value, Windows
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.mellum import sparse_by_type
from qtool.convert.models.parts import decoder_tensors

_V1 = Mixture(shared="mlp.shared_mlp", routed_by="gate.wg")
_V3 = Mixture(
    shared="mlp.shared_mlp",
    score_bias="mlp.expert_bias",
    routed_by="router.gate",
    renamed={
        "mlp.router.gate": "mlp.gate",
        "mlp.expert_bias": "mlp.e_score_correction_bias",
        "mlp.shared_mlp": "mlp.shared_experts",
    },
)


def _alike(settings: Settings, key: str, usual: int) -> int:
    """A number that may be said for each layer. Raises QtoolError where they differ."""
    value: Any = settings.get(key)
    if isinstance(value, list) and value:
        if len(set(map(str, value))) > 1:
            raise QtoolError(f"config.json: {key} differs from layer to layer; qtool's layers are alike.")
        value = value[0]
    return usual if value is None else value


def _each_layer(settings: Settings) -> dict[str, Any]:
    return {"num_experts_per_tok": _alike(settings, "moe_topk", 1)}


def _shape_v1(settings: Settings, shape: Geometry) -> Geometry:
    """transformers' experts and shared expert are `intermediate_size` wide, whatever else config.json says."""
    for key, usual in (("moe_intermediate_size", shape.intermediate), ("num_shared_expert", 1)):
        if _alike(settings, key, usual) != usual:
            raise QtoolError(f"config.json: {key} is {settings[key]!r}; transformers' HunYuanMoEV1ForCausalLM takes "
                             f"{usual}.")  # fmt: skip
    counted = {**settings, "num_experts": _alike(settings, "num_experts", 1)}
    return with_experts(shape, counted, "num_experts", shape.intermediate, (True,) * shape.layers, shape.intermediate)


def _keys_v1(settings: Settings, shape: Geometry, rope: Ropes) -> dict[str, Value]:
    widths = {"expert_feed_forward_length": shape.expert_width, "expert_shared_feed_forward_length": shape.shared_width}
    return expert_keys(shape) | widths


def _refuse_v1(settings: Settings, rope: Ropes) -> None:
    check_own_head(settings, "hunyuan-moe")


def _shape_v3(settings: Settings, shape: Geometry) -> Geometry:
    width = whole_number(settings, "moe_intermediate_size")
    kinds = settings.get("mlp_layer_types") or ["dense"] + ["sparse"] * (shape.layers - 1)
    sparse = sparse_by_type({"mlp_layer_types": kinds}, shape.layers)
    return with_experts(
        shape, settings, "num_experts", width, sparse, width * whole_number(settings, "num_shared_experts")
    )


HUNYUAN_MOE = Family(
    "HunYuanMoEV1ForCausalLM",
    decoder_tensors(head_norms=("query_layernorm", "key_layernorm"), mlp=mixture_tensors(_V1)),
    mixed_decoder(_V1),
    SILU,
    Windows("none"),
    {"hidden_act": "silu", "rope_theta": 1e4, "max_position_embeddings": 2048, "num_experts": 1, "rms_norm_eps": 1e-5},
    derived=_each_layer,
    shape=_shape_v1,
    mixture=_V1,
    uncast=(_V1.router,),
    gguf=GgufFacts(
        "hunyuan-moe",
        keys=_keys_v1,
        required=("expert_count", "expert_used_count", "expert_feed_forward_length"),
        refuse=_refuse_v1,
        says=frozenset((
            "num_experts", "moe_topk", "num_experts_per_tok", "moe_intermediate_size", "num_shared_expert",
            "eod_token_id", "sep_token_id",
        )),
    ),
)  # fmt: skip
HY_V3 = Family(
    "HYV3ForCausalLM",
    decoder_tensors(head_norms=True, mlp=mixture_tensors(_V3)),
    mixed_decoder(_V3),
    SILU,
    Windows("none"),
    {
        "hidden_act": "silu", "rope_theta": 11158840.0, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "num_experts": 192, "num_experts_per_tok": 8, "num_shared_experts": 1,
        "moe_intermediate_size": 1536, "router_scaling_factor": 2.826,
    },
    aliases={"num_local_experts": "num_experts"},
    shape=_shape_v3,
    mixture=_V3,
    uncast=(_V3.router, _V3.score_bias, "mlp.e_score_correction_bias"),
    drafts=True,
)  # fmt: skip
