"""ERNIE 4.5: Llama that rotates neighbouring pairs; with mixtures of experts, a softmax router whose choice a bias
corrects, in float32."""

from __future__ import annotations

from dataclasses import replace

from qtool import QtoolError
from qtool.convert.models.experts import Mixture, mixed_decoder, mixture_tensors, whole_number, with_experts
from qtool.convert.models.family import SILU, Family, GgufFacts, Ropes, Settings, Windows
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import decoder_tensors, gated_decoder

_MIXTURE = Mixture(
    shared="mlp.shared_experts",
    score_bias="mlp.moe_statics.e_score_correction_bias",
    bias_in_row=True,
    renamed={"mlp.moe_statics": "mlp.gate.moe_statics"},
)
_DEFAULTS = {
    "hidden_act": "silu", "rope_theta": 5e5, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip


def _biases(settings: Settings, shape: Geometry) -> Geometry:
    biased = bool(settings.get("use_bias"))
    return replace(shape, attention_bias=biased, mlp_bias=biased)


def _refuse_biases(settings: Settings, ropes: Ropes) -> None:
    if settings.get("use_bias"):
        raise QtoolError("config.json: use_bias is true; llama.cpp's ernie4_5 has no biases of the MLP.")


def _shape_moe(settings: Settings, shape: Geometry) -> Geometry:
    if settings.get("use_bias"):
        raise QtoolError("config.json: use_bias is true; no mixture of qtool's has biases.")
    first, step = whole_number(settings, "moe_layer_start_index", 0), whole_number(settings, "moe_layer_interval")
    end = settings["moe_layer_end_index"]
    last = shape.layers - 1 if end == -1 else whole_number(settings, "moe_layer_end_index", 0)
    sparse = [(layer + 1) % step == 0 and first <= layer <= last for layer in range(shape.layers)]
    width = whole_number(settings, "moe_intermediate_size")
    shared = width * whole_number(settings, "moe_num_shared_experts", 1)
    return with_experts(shape, settings, "num_experts", width, sparse, shared)


ERNIE = Family(
    "Ernie4_5ForCausalLM",
    decoder_tensors(),
    gated_decoder(),
    SILU,
    Windows("none"),
    _DEFAULTS | {"num_key_value_heads": 2, "head_dim": 128},
    shape=_biases,
    gguf=GgufFacts("ernie4_5", refuse=_refuse_biases, says=frozenset(("use_bias",))),
)
ERNIE_MOE = Family(
    "Ernie4_5_MoeForCausalLM",
    decoder_tensors(mlp=mixture_tensors(_MIXTURE)),
    mixed_decoder(_MIXTURE),
    SILU,
    Windows("none"),
    _DEFAULTS | {
        "num_key_value_heads": 4, "num_experts_per_tok": 6, "num_experts": 64, "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1,
    },
    aliases={"moe_num_experts": "num_experts", "moe_k": "num_experts_per_tok"},
    shape=_shape_moe,
    mixture=_MIXTURE,
    uncast=(_MIXTURE.router, _MIXTURE.score_bias, "mlp.gate.moe_statics.e_score_correction_bias"),
)  # fmt: skip
