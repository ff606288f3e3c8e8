"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from qtool.convert.models.experts import Mixture, expert_keys, mixed_decoder, mixture_tensors, with_experts
from qtool.convert.models.family import SILU, Family, GgufFacts, Settings, Windows
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import decoder_tensors

_MIXTURE = Mixture(block="block_sparse_moe", gate="w1", up="w3", down="w2")
_DEFAULTS = {
    "hidden_act": "silu", "rope_theta": 1e6, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    return with_experts(shape, settings, "num_local_experts", shape.intermediate, (True,) * shape.layers)


MIXTRAL = Family(
    "MixtralForCausalLM",
    decoder_tensors(mlp=mixture_tensors(_MIXTURE)),
    mixed_decoder(_MIXTURE),
    SILU,
    Windows("all"),
    _DEFAULTS,
    aliases={"num_experts": "num_local_experts"},
    shape=_shape,
    mixture=_MIXTURE,
    gguf=GgufFacts(
        "llama",
        permuted=True,
        factors=True,
        keys=lambda settings, shape, rope: expert_keys(shape),
        required=("expert_count", "expert_used_count"),
        says=frozenset(("num_local_experts", "num_experts_per_tok", "router_jitter_noise")),  # the last trains
    ),
)
