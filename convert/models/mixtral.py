"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from qtool.convert.models.experts import Mixture, mixed_decoder, mixture_tensors
from qtool.convert.models.family import SILU, Family, GgufFacts, Settings, Windows
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import decoder_tensors

_MIXTURE = Mixture(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    return replace(
        shape,
        experts=int(settings["num_local_experts"]),
        active=int(settings["num_experts_per_tok"]),
        expert_width=shape.intermediate,
        sparse=(True,) * shape.layers,
    )


MIXTRAL = Family(
    "MixtralForCausalLM",
    decoder_tensors(mlp=mixture_tensors(_MIXTURE)),
    mixed_decoder(_MIXTURE),
    SILU,
    Windows("all"),
    {
        "hidden_act": "silu",
        "rope_theta": 1e6,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },  # fmt: skip
    shape=_shape,
    mixture=_MIXTURE,
    gguf=GgufFacts("llama", permuted=True, factors=True),
)
