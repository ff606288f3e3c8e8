"""Parts that several families are built of: a decoder's tensors, and the feeds of attention and a gated MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qtool.convert.models.feeds import Feed, Heads, Norm, Rows, Shape, whole
from qtool.convert.models.geometry import Geometry

TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")  # noqa: E741  # as transformers calls them
GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"


def gated_decoder(
    before_mlp: str = "post_attention_layernorm", plus_one: bool = False, adds: bool = True
) -> Callable[[Geometry, int], tuple[Feed, ...]]:
    """Feeds of attention and a gated MLP, each behind a norm, in every layer; the MLP's norm is ``before_mlp``. Norms
    behind o_proj or down_proj (then ``adds`` is False), and those of q and k, absorb nothing."""

    def feeds(shape: Geometry, layer: int) -> tuple[Feed, ...]:
        heads = Heads(whole(V), shape.heads // shape.kv_heads, shape.head_dim)
        return (
            Feed(Norm("input_layernorm", plus_one), (whole(Q), whole(K), whole(V))),
            Feed(heads, (whole(O),), split=True, adds=adds),
            Feed(Norm(before_mlp, plus_one), (whole(GATE), whole(UP))),
            Feed(Rows(whole(UP)), (whole(DOWN),), split=True, adds=adds),
        )

    return feeds


def decoder_tensors(
    norms: Sequence[str] = TWO_NORMS, head_norms: bool = False, qkv_bias: bool = False
) -> Callable[[Geometry], dict[str, Shape]]:
    """Tensors of an embedding, such layers, a final norm and a head. ``norms``: of a layer's hidden states.
    ``head_norms``: q and k have one each, over a head. ``qkv_bias``: q, k and v have biases and o has none, whatever
    `attention_bias` says."""

    def tensors(shape: Geometry) -> dict[str, Shape]:
        found: dict[str, Shape] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
        for index in range(shape.layers):
            layer = _linears(shape, qkv_bias) | {f"{norm}.weight": (shape.hidden,) for norm in norms}
            if head_norms:
                layer |= {f"self_attn.{norm}.weight": (shape.head_dim,) for norm in ("q_norm", "k_norm")}
            found |= {f"model.layers.{index}.{name}": size for name, size in layer.items()}
        found["model.norm.weight"] = (shape.hidden,)
        return found if shape.tied else found | {"lm_head.weight": (shape.vocab, shape.hidden)}

    return tensors


def _linears(shape: Geometry, qkv_bias: bool) -> dict[str, Shape]:
    q, kv, hidden, inner = shape.q_row, shape.kv_row, shape.hidden, shape.intermediate
    sizes = {
        Q: (q, hidden), K: (kv, hidden), V: (kv, hidden), O: (hidden, q),
        GATE: (inner, hidden), UP: (inner, hidden), DOWN: (hidden, inner),
    }  # fmt: skip
    biased = {Q, K, V} if qkv_bias else {Q, K, V, O} if shape.attention_bias else set()
    biased |= {GATE, UP, DOWN} if shape.mlp_bias else set()
    weights: dict[str, Shape] = {f"{name}.weight": size for name, size in sizes.items()}
    return weights | {f"{name}.bias": (size[0],) for name, size in sizes.items() if name in biased}
