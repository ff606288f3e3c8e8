"""StarCoder 2: LayerNorms with biases, biases everywhere, and an MLP without a gate."""

from __future__ import annotations

from dataclasses import replace

from qtool.convert.models.family import TANH_GELU, Family, Settings, Windows
from qtool.convert.models.feeds import Feed, Heads, Norm, Nothing, Shape, whole
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import TWO_NORMS, K, O, Q, V

FC, PROJ = "mlp.c_fc", "mlp.c_proj"


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    biased = bool(settings["use_bias"])
    return replace(shape, attention_bias=biased, mlp_bias=biased, mlp_matrices=2)


def _tensors(shape: Geometry) -> dict[str, Shape]:
    hidden, inner = shape.hidden, shape.intermediate
    matrices = {
        Q: (shape.q_row, hidden), K: (shape.kv_row, hidden), V: (shape.kv_row, hidden), O: (hidden, shape.q_row),
        FC: (inner, hidden), PROJ: (hidden, inner),
    }  # fmt: skip
    found: dict[str, Shape] = {"model.embed_tokens.weight": (shape.vocab, hidden)}
    for layer in range(shape.layers):
        for name, size in matrices.items():
            found[f"model.layers.{layer}.{name}.weight"] = size
            if shape.attention_bias:
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
        Feed(Norm("post_attention_layernorm"), (whole(FC),)),
        Feed(Nothing(), (whole(PROJ),), split=True),  # gelu lies between: no scale passes it
    )


STARCODER2 = Family(
    "Starcoder2ForCausalLM",
    _tensors,
    _feeds,
    replace(TANH_GELU, key="hidden_act"),
    Windows("all"),
    {"num_key_value_heads": 2, "max_position_embeddings": 4096, "use_bias": True, "tie_word_embeddings": True},
    shape=_shape,
)
