"""Mellum 2, JetBrains' code model: Qwen 3's attention and mixtures of experts, whose layers slide or not and rotate by
kind, and say one by one whether their MLP is a mixture."""

from __future__ import annotations

from typing import Any

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
from qtool.convert.models.family import FULL, SILU, SLIDING, Family, GgufFacts, Ropes, Settings, Value, Windows
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import decoder_tensors

_MIXTURE = Mixture()
_DEFAULTS = {
    "hidden_act": "silu", "rope_theta": 5e5, "num_key_value_heads": 4, "head_dim": 128, "sliding_window": 1024,
    "max_position_embeddings": 131072, "moe_intermediate_size": 896, "num_experts_per_tok": 8, "num_experts": 64,
    "norm_topk_prob": True,
    "rope_parameters": {
        FULL: {"rope_type": "default", "rope_theta": 5e5}, SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip


def sparse_by_type(settings: Settings, layers: int, usual: str = "sparse") -> tuple[bool, ...]:
    """Which layers `mlp_layer_types` calls sparse; all are of the ``usual`` type without it. Raises QtoolError for what
    names no layers."""
    kinds: Any = settings.get("mlp_layer_types")
    if kinds is None:
        kinds = [usual] * layers
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {"sparse", "dense"}:
        raise QtoolError(f"config.json: mlp_layer_types is {kinds!r}; {layers} times 'sparse' or 'dense' are needed.")
    return tuple(kind == "sparse" for kind in kinds)


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    sparse = sparse_by_type(settings, shape.layers)
    return with_experts(shape, settings, "num_experts", whole_number(settings, "moe_intermediate_size"), sparse)


def _all_full(settings: Settings) -> dict[str, Any]:
    return {"layer_types": [FULL] * int(settings.get("num_hidden_layers") or 0)}


def _keys(settings: Settings, shape: Geometry, rope: Ropes) -> dict[str, Value]:
    """llama.cpp src/models/mellum.cpp."""
    keys = expert_keys(shape) | {"expert_feed_forward_length": shape.expert_width}
    full = [index for index, window in enumerate(shape.windows) if window is None]
    if len(full) == shape.layers:
        return keys
    period = full[0] + 1 if full else shape.layers + 1
    if full != [index for index in range(shape.layers) if (index + 1) % period == 0]:
        raise QtoolError(f"config.json: attention slides in all of {shape.layers} layers but {full}; qtool writes one "
                         "layer in so many that attends to everything.")  # fmt: skip
    return keys | {
        "attention.sliding_window": int(settings["sliding_window"]),
        "attention.sliding_window_pattern": period,
    }


def _refuse(settings: Settings, rope: Ropes) -> None:
    check_normalized(settings, "mellum", always=True)
    check_own_head(settings, "mellum")
    check_all_sparse(sparse_by_type(settings, int(settings["num_hidden_layers"])), "mellum")
    sliding = SLIDING in (settings.get("layer_types") or ())
    if sliding and rope[SLIDING] != {"freq_base": rope[FULL]["freq_base"]}:
        raise QtoolError(
            f"config.json: rope_parameters of {SLIDING} are others than a rope_theta equal to that of {FULL}; "
            "llama.cpp's mellum turns sliding layers by the others' base, without any scaling."
        )


MELLUM = Family(
    "MellumForCausalLM",
    decoder_tensors(head_norms=True, mlp=mixture_tensors(_MIXTURE)),
    mixed_decoder(_MIXTURE),
    SILU,
    Windows("some"),
    _DEFAULTS,
    aliases={"num_local_experts": "num_experts"},
    derived=_all_full,
    shape=_shape,
    mixture=_MIXTURE,
    rope_kinds=(FULL, SLIDING),
    gguf=GgufFacts(
        "mellum",
        windows=True,
        keys=_keys,
        required=("expert_count", "expert_used_count", "expert_feed_forward_length"),
        refuse=_refuse,
        names="qwen3moe",
        says=frozenset((
            "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
            "mlp_layer_types", "num_mtp_layers", "num_nextn_predict_layers", "mtp_layer_types", "mtp_mlp_layer_types",
        )),
    ),
)  # fmt: skip
