"""MiniMax-M2: a mixture of experts in every layer, its sigmoid router's choice corrected by a bias; norms of q and k
over all their heads at once; the first part of every head rotated.

Router and bias are computed in float32 and keep their dtype: rounded to 16 bits, close scores change places.
Checkpoints come in float8 of 128 x 128 blocks.
"""

from __future__ import annotations

from typing import Any

from qtool import QtoolError
from qtool.convert.models.experts import Mixture, expert_keys, mixed_decoder, mixture_tensors, with_experts
from qtool.convert.models.family import SILU, Family, GgufFacts, Ropes, Settings, Value, Windows
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.glm4_moe import SIGMOID
from qtool.convert.models.parts import decoder_tensors

_MIXTURE = Mixture(
    block="block_sparse_moe", gate="w1", up="w3", down="w2", score_bias="block_sparse_moe.e_score_correction_bias"
)
_DEFAULTS = {
    "hidden_act": "silu", "rope_theta": 5e6, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 196608, "num_experts_per_tok": 8, "num_local_experts": 256,
}  # fmt: skip
# what its published config.json says and transformers' class, which has one way alone, does not read
_ALWAYS = {
    "use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True, "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
}  # fmt: skip


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    for key, usual in _ALWAYS.items():
        if settings.get(key) not in (None, usual):
            raise QtoolError(f"config.json: {key} is {settings[key]!r}; transformers' MiniMaxM2ForCausalLM always has "
                             f"{usual!r}.")  # fmt: skip
    return with_experts(shape, settings, "num_local_experts", shape.intermediate, (True,) * shape.layers)


def _rotated(settings: Settings) -> dict[str, Any]:
    """`rotary_dim`, which says how much of a head is rotated, as transformers' key says it."""
    part, whole = settings.get("rotary_dim"), settings.get("head_dim")
    return {"partial_rotary_factor": part / whole} if isinstance(part, int) and isinstance(whole, int) and whole else {}


def _runtime_keys(settings: Settings) -> dict[str, Any]:
    """vLLM looks for `rotary_dim` alone."""
    rope = settings.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor")) or 1
    return {"rotary_dim": int(settings["head_dim"] * part)}


def _keys(settings: Settings, shape: Geometry, rope: Ropes) -> dict[str, Value]:
    return expert_keys(shape) | {"expert_feed_forward_length": shape.expert_width, "expert_gating_func": SIGMOID}


MINIMAX_M2 = Family(
    "MiniMaxM2ForCausalLM",
    decoder_tensors(row_norms=True, mlp=mixture_tensors(_MIXTURE)),
    mixed_decoder(_MIXTURE),
    SILU,
    Windows("none"),
    _DEFAULTS,
    aliases={"num_experts": "num_local_experts"},
    derived=_rotated,
    shape=_shape,
    mixture=_MIXTURE,
    uncast=(_MIXTURE.router, _MIXTURE.score_bias),
    partial_rotary=True,
    runtime_keys=_runtime_keys,
    gguf=GgufFacts(
        "minimax-m2",
        keys=_keys,
        required=("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_gating_func"),
        says=frozenset((
            "num_local_experts", "num_experts", "num_experts_per_tok", "rotary_dim", "router_jitter_noise",
        )),
    ),
)  # fmt: skip
