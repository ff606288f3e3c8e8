"""StableLM: LayerNorms with biases, a quarter of every head rotated, and biases on q, k and v in some models."""

from __future__ import annotations

from dataclasses import replace

from qtool.convert.models.family import SILU, Family, Windows
from qtool.convert.models.feeds import Feed, Heads, Norm, Rows, Shape, whole
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import DOWN, GATE, TWO_NORMS, UP, K, O, Q, V


def _tensors(shape: Geometry) -> dict[str, Shape]:
    hidden, inner = shape.hidden, shape.intermediate
    matrices = {
        Q: (shape.q_row, hidden), K: (shape.kv_row, hidden), V: (shape.kv_row, hidden), O: (hidden, shape.q_row),
        GATE: (inner, hidden), UP: (inner, hidden), DOWN: (hidden, inner),
    }  # fmt: skip
    found: dict[str, Shape] = {"model.embed_tokens.weight": (shape.vocab, hidden)}
    for layer in range(shape.layers):
        for name, size in matrices.items():
            found[f"model.layers.{layer}.{name}.weight"] = size
            if shape.attention_bias and name in (Q, K, V):
                found[f"model.layers.{layer}.{name}.bias"] = size[:1]
        for norm in TWO_NORMS:
            found[f"model.layers.{layer}.{norm}.weight"] = found[f"model.layers.{layer}.{norm}.bias"] = (hidden,)
    found["model.norm.weight"] = found["model.norm.bias"] = (hidden,)
    return found if shape.tied else found | {"lm_head.weight": (shape.vocab, hidden)}


def _feeds(shape: Geometry, layer: int) -> tuple[Feed, ...]:
    values = Heads(whole(V), shape.heads // shape.kv_heads, shape.head_dim)
    return (
        Feed(Norm("input_layernorm"), (whole(Q), whole(K), whole(V))),
        Feed(values, (whole(O),), split=True),
        Feed(Norm("post_attention_layernorm"), (whole(GATE), whole(UP))),
        Feed(Rows(whole(UP)), (whole(DOWN),), split=True),
    )


STABLELM = Family(
    "StableLmForCausalLM",
    _tensors,
    _feeds,
    SILU,
    Windows("none"),
    {"num_key_value_heads": 32, "max_position_embeddings": 4096, "partial_rotary_factor": 0.25},
    shape=lambda settings, shape: replace(shape, attention_bias=bool(settings.get("use_qkv_bias"))),
    partial_rotary=True,
)
