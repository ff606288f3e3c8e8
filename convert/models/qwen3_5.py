"""Qwen 3.5 and 3.6, and Qwen3-Next before them (Qwen3-Coder-Next): three of four layers are gated delta nets, the last
attends with an output gate; dense or with mixtures of experts behind either. Norms apply 1 + weight but for one.

    delta net    input_layernorm ─▶ in_proj_qkv, in_proj_z     also: in_proj_a, in_proj_b (a row for each head)
                 linear_attn.norm · silu(z) ─▶ out_proj        one weight for all heads, which the gate's factor passes
    attention    input_layernorm ─▶ q and its gate, k, v       v ─▶ o: the gate multiplies channels, a scale passes it

A delta net keeps a state of fixed size in place of keys and values; it is counted as the tokens whose keys and values
would take as much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qtool import QtoolError
from qtool.convert.models.experts import Mixture, mixture_feeds, mixture_tensors, whole_number, with_experts
from qtool.convert.models.family import FULL, SILU, Family, Settings, Windows
from qtool.convert.models.feeds import Feed, Heads, Norm, Rows, Shape, whole
from qtool.convert.models.geometry import WIDTHS, Geometry
from qtool.convert.models.parts import DOWN, GATE, TWO_NORMS, UP, K, O, Q, V, gated_tensors
from qtool.convert.models.qwen3_moe import sparse_layers

_LINEAR = "linear_attention"
_AT = "linear_attn"
_STATE_WIDTH = 4  # bytes: states are float32
_MIXTURE = Mixture(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate.weight")
# of a delta net: the matrices that read its input, and those of a row for each head, which stay as they are
_APART = ((f"{_AT}.in_proj_qkv", f"{_AT}.in_proj_z"), (f"{_AT}.in_proj_b", f"{_AT}.in_proj_a"))
_TOGETHER = ((f"{_AT}.in_proj_qkvz",), (f"{_AT}.in_proj_ba",))
_DEFAULTS = {
    "hidden_act": "silu", "rope_theta": 1e4, "max_position_embeddings": 32768, "head_dim": 256, "rms_norm_eps": 1e-6,
    "partial_rotary_factor": 0.25, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "full_attention_interval": 4,
}  # fmt: skip
_MOE = {
    "num_key_value_heads": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8, "num_experts": 256,
}  # fmt: skip


def _derived(settings: Settings) -> dict[str, Any]:
    layers, period = int(settings.get("num_hidden_layers") or 0), whole_number(settings, "full_attention_interval")
    kinds = [_LINEAR if (layer + 1) % period else FULL for layer in range(layers)]
    return {"layer_types": kinds, "intermediate_size": settings.get("moe_intermediate_size")}


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    kinds: Any = settings["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != shape.layers or not set(kinds) <= {FULL, _LINEAR}:
        raise QtoolError(f"config.json: layer_types is {kinds!r}; {shape.layers} times {FULL!r} or {_LINEAR!r} are "
                         "needed.")  # fmt: skip
    if settings.get("attention_bias"):
        raise QtoolError("config.json: attention_bias is true; qtool knows Qwen 3.5's attention without biases.")
    keys, values, key_dim, value_dim, kernel = (
        whole_number(settings, f"linear_{key}")
        for key in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    )
    state = values * key_dim * value_dim * _STATE_WIDTH
    token = 2 * shape.kv_row * WIDTHS.get(shape.dtype, 2)
    return replace(
        shape,
        windows=tuple(None if kind == FULL else -(-state // token) for kind in kinds),
        delta=(keys, values, key_dim, value_dim, kernel),
    )


def _shape_moe(settings: Settings, shape: Geometry) -> Geometry:
    sparse = sparse_layers({"decoder_sparse_step": 1, **settings}, shape.layers)
    width, shared = (whole_number(settings, f"{key}_intermediate_size") for key in ("moe", "shared_expert"))
    return with_experts(_shape(settings, shape), settings, "num_experts", width, sparse, shared)


def _tensors(together: bool) -> Callable[[Geometry], dict[str, Shape]]:
    def tensors(shape: Geometry) -> dict[str, Shape]:
        hidden = shape.hidden
        found: dict[str, Shape] = {"model.embed_tokens.weight": (shape.vocab, hidden), "model.norm.weight": (hidden,)}
        for index, window in enumerate(shape.windows):
            layer = mixture_tensors(_MIXTURE)(shape, index) if shape.experts else gated_tensors(shape, index)
            layer |= {f"{norm}.weight": (hidden,) for norm in TWO_NORMS}
            layer |= _attention(shape) if window is None else _delta(shape, together)
            found |= {f"model.layers.{index}.{name}": size for name, size in layer.items()}
        return found if shape.tied else found | {"lm_head.weight": (shape.vocab, hidden)}

    return tensors


def _attention(shape: Geometry) -> dict[str, Shape]:
    rows = {Q: 2 * shape.q_row, K: shape.kv_row, V: shape.kv_row}  # q's rows and its gate's, head by head
    found: dict[str, Shape] = {f"{name}.weight": (count, shape.hidden) for name, count in rows.items()}
    found |= {f"self_attn.{norm}_norm.weight": (shape.head_dim,) for norm in "qk"}
    return found | {f"{O}.weight": (shape.hidden, shape.q_row)}


def _delta(shape: Geometry, together: bool) -> dict[str, Shape]:
    keys, values, key_dim, value_dim, kernel = shape.delta
    mixed, gated = 2 * keys * key_dim + values * value_dim, values * value_dim
    rows = ((mixed + gated,), (2 * values,)) if together else ((mixed, gated), (values, values))
    names = _TOGETHER if together else _APART
    found: dict[str, Shape] = {
        f"{name}.weight": (count, shape.hidden)
        for kind, counts in zip(names, rows, strict=True)
        for name, count in zip(kind, counts, strict=True)
    }
    return found | {
        f"{_AT}.conv1d.weight": (mixed, 1, kernel), f"{_AT}.A_log": (values,), f"{_AT}.dt_bias": (values,),
        f"{_AT}.norm.weight": (value_dim,), f"{_AT}.out_proj.weight": (shape.hidden, gated),
    }  # fmt: skip


def _feeds(together: bool) -> Callable[[Geometry, int], tuple[Feed, ...]]:
    matrices, few = _TOGETHER if together else _APART

    def feeds(shape: Geometry, layer: int) -> tuple[Feed, ...]:
        before = Norm("input_layernorm", plus_one=True)
        if shape.windows[layer] is None:
            values = Heads(whole(V), shape.heads // shape.kv_heads, shape.head_dim)
            mixer = Feed(before, (whole(Q), whole(K), whole(V))), Feed(values, (whole(O),), split=True, adds=True)
        else:
            norm = Norm(f"{_AT}.norm", repeated=shape.delta[3])
            mixer = (
                Feed(before, tuple(map(whole, matrices)), also=tuple(f"{name}.weight" for name in few)),
                Feed(norm, (whole(f"{_AT}.out_proj"),), split=True, adds=True),
            )
        if shape.is_sparse(layer):
            return (*mixer, *mixture_feeds(_MIXTURE, shape, plus_one=True))
        return (
            *mixer,
            Feed(Norm("post_attention_layernorm", plus_one=True), (whole(GATE), whole(UP))),
            Feed(Rows(whole(UP)), (whole(DOWN),), split=True, adds=True),
        )

    return feeds


QWEN3_5 = Family(
    "Qwen3_5ForCausalLM",
    _tensors(together=False),
    _feeds(together=False),
    SILU,
    Windows("none"),
    _DEFAULTS | {"num_key_value_heads": 4},
    derived=_derived,
    shape=_shape,
    plus_one=("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight"),
    uncast=(f"{_AT}.A_log", f"{_AT}.dt_bias"),
    partial_rotary=True,
    no_gguf="cannot be written as GGUF yet: llama.cpp wants the delta nets' rows in an order of its own",
)
QWEN3_5_MOE = replace(
    QWEN3_5,
    name="Qwen3_5MoeForCausalLM",
    defaults=_DEFAULTS | _MOE,
    shape=_shape_moe,
    mixture=_MIXTURE,
)
QWEN3_NEXT = replace(
    QWEN3_5_MOE,
    name="Qwen3NextForCausalLM",
    tensors=_tensors(together=True),
    feeds=_feeds(together=True),
    defaults=_DEFAULTS | _MOE | {"num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True},
)
