"""Laguna, Poolside's code model: attention whose output is multiplied by gates, layers with heads of their own number,
and mixtures of experts behind a sigmoid router with a bias, beside a shared expert.

A gate multiplies all channels of a head alike (or each channel by its own), so a scale of the values passes it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qtool import QtoolError
from qtool.convert.models.experts import Mixture, mixture_feeds, mixture_tensors, whole_number, with_experts
from qtool.convert.models.family import FULL, SILU, SLIDING, Family, Settings, Windows
from qtool.convert.models.feeds import Feed, Norm, Rows, Shape, whole
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.mellum import sparse_by_type
from qtool.convert.models.parts import DOWN, GATE, TWO_NORMS, UP, K, Q, V, attention_feeds, decoder_tensors

_GATES = "self_attn.g_proj"
_MIXTURE = Mixture(
    shared="mlp.shared_expert",
    score_bias="mlp.experts.e_score_correction_bias",
    renamed={
        "mlp.experts.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
        "mlp.shared_expert": "mlp.shared_experts",
    },
)
_DEFAULTS = {
    "hidden_act": "silu", "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512, "sliding_window": 512, "gating": True,
    "shared_expert_intermediate_size": 512, "rms_norm_eps": 1e-6,
    "rope_parameters": {
        FULL: {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    },
}  # fmt: skip


def _derived(settings: Settings) -> dict[str, Any]:
    layers = int(settings.get("num_hidden_layers") or 0)
    return {"layer_types": [FULL] * layers, "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1)}


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    """The widest layer's heads stand for all where memory is counted."""
    heads = settings.get("num_attention_heads_per_layer") or [shape.heads] * shape.layers
    fine = isinstance(heads, list) and len(heads) == shape.layers and all(type(n) is int and n > 0 for n in heads)
    if not fine or any(count % shape.kv_heads for count in heads):
        raise QtoolError(f"config.json: num_attention_heads_per_layer is {heads!r}; {shape.layers} multiples of "
                         f"{shape.kv_heads} are needed.")  # fmt: skip
    if settings.get("gating") not in (True, "per-head", "per-element"):
        raise QtoolError(f"config.json: gating is {settings.get('gating')!r}; true, 'per-head' or 'per-element' is "
                         "needed.")  # fmt: skip
    mixed = with_experts(
        shape,
        settings,
        "num_experts",
        whole_number(settings, "moe_intermediate_size"),
        sparse_by_type(settings, shape.layers),
        whole_number(settings, "shared_expert_intermediate_size"),
    )
    each = settings.get("gating") == "per-element"
    return replace(mixed, heads=max(heads), heads_by_layer=tuple(heads), gate_rows=shape.head_dim if each else 1)


def _at(shape: Geometry, layer: int) -> Geometry:
    return replace(shape, heads=shape.heads_by_layer[layer])


def _tensors(shape: Geometry) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for layer in range(shape.layers):
        own = _at(shape, layer)
        tensors = decoder_tensors(TWO_NORMS, head_norms=True, mlp=mixture_tensors(_MIXTURE))(own)
        found |= {name: size for name, size in tensors.items() if f"layers.{layer}." in name or "layers." not in name}
        found[f"model.layers.{layer}.{_GATES}.weight"] = (own.heads * own.gate_rows, shape.hidden)
    return found


def _feeds(shape: Geometry, layer: int) -> tuple[Feed, ...]:
    """Gates of heads are few rows and stay as they are; gates of channels are as many as q's and are quantized."""
    _, output = attention_feeds(_at(shape, layer))
    each = shape.gate_rows > 1
    matrices = (whole(Q), whole(K), whole(V), *((whole(_GATES),) if each else ()))
    read = Feed(Norm("input_layernorm"), matrices, also=() if each else (f"{_GATES}.weight",))
    if shape.is_sparse(layer):
        return (read, output, *mixture_feeds(_MIXTURE, shape))
    return (
        read,
        output,
        Feed(Norm("post_attention_layernorm"), (whole(GATE), whole(UP))),
        Feed(Rows(whole(UP)), (whole(DOWN),), split=True, adds=True),
    )


LAGUNA = Family(
    "LagunaForCausalLM",
    _tensors,
    _feeds,
    SILU,
    Windows("some"),
    _DEFAULTS,
    derived=_derived,
    shape=_shape,
    mixture=_MIXTURE,
    rope_kinds=(FULL, SLIDING),
    uncast=(_MIXTURE.score_bias, "mlp.gate.e_score_correction_bias"),
    partial_rotary=True,
    no_gguf="cannot be written as GGUF yet: the gguf package has no names for its gates",
)  # fmt: skip
