"""Parts that several families are built of: a decoder's tensors, and the feeds of attention and a gated MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qtool.convert.models.feeds import Feed, Heads, Norm, Nothing, Rows, Shape, whole
from qtool.convert.models.geometry import Geometry

TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")  # noqa: E741  # as transformers calls them
QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"  # of q, k, v below each other; of gate, then up
GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"


def gated_decoder(
    before_mlp: str = "post_attention_layernorm", plus_one: bool = False, adds: bool = True
) -> Callable[[Geometry, int], tuple[Feed, ...]]:
    """Feeds of attention and a gated MLP, each behind a norm, in every layer; the MLP's norm is ``before_mlp``. Norms
    behind o_proj or down_proj (then ``adds`` is False), and those of q and k, absorb nothing."""

    def feeds(shape: Geometry, layer: int) -> tuple[Feed, ...]:
        return (
            *attention_feeds(shape, plus_one, adds),
            Feed(Norm(before_mlp, plus_one), (whole(GATE), whole(UP))),
            Feed(Rows(whole(UP)), (whole(DOWN),), split=True, adds=adds),
        )

    return feeds


def fused_mlp(before_mlp: str, shape: Geometry, adds: bool = True) -> tuple[Feed, Feed]:
    """Of an MLP whose gate and up are one matrix: its lower half makes what enters down."""
    inner = shape.intermediate
    return (
        Feed(Norm(before_mlp), (whole(GATE_UP),)),
        Feed(Rows(whole(GATE_UP), inner, inner), (whole(DOWN),), split=True, adds=adds),
    )


def fused_tensors(shape: Geometry, layer: int) -> dict[str, Shape]:
    """Of such an MLP."""
    inner, hidden = shape.intermediate, shape.hidden
    return {f"{GATE_UP}.weight": (2 * inner, hidden), f"{DOWN}.weight": (hidden, inner)}


def attention_feeds(shape: Geometry, plus_one: bool = False, adds: bool = True) -> tuple[Feed, Feed]:
    """Of q, k and v behind a norm, and of o behind the values."""
    heads = Heads(whole(V), shape.heads // shape.kv_heads, shape.head_dim)
    return (
        Feed(Norm("input_layernorm", plus_one), (whole(Q), whole(K), whole(V))),
        Feed(Nothing() if shape.clipped_values else heads, (whole(O),), split=True, adds=adds),
    )


def decoder_tensors(
    norms: Sequence[str] = TWO_NORMS,
    head_norms: bool | tuple[str, str] = False,
    row_norms: bool = False,
    qkv_bias: bool = False,
    norm_biases: bool = False,
    mlp: Callable[[Geometry, int], dict[str, Shape]] | None = None,
    attention: Callable[[Geometry], dict[str, Shape]] | None = None,
) -> Callable[[Geometry], dict[str, Shape]]:
    """Tensors of an embedding, such layers, a final norm and a head. ``norms``: of a layer's hidden states.
    ``head_norms``: q and k have one each, over a head, called so where they have other names; ``row_norms``: over all
    their heads at once. ``qkv_bias``: q, k and v have biases and o has none, whatever `attention_bias` says.
    ``norm_biases``: of norms of hidden states, which are LayerNorms then. ``mlp``: of a layer's MLP, where that is not
    one of gate, up and down in every layer. ``attention``: of its matrices, where they are not q, k, v and o."""

    kinds = ("weight", "bias") if norm_biases else ("weight",)

    def tensors(shape: Geometry) -> dict[str, Shape]:
        found: dict[str, Shape] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
        for index in range(shape.layers):
            layer = (attention(shape) if attention else _attention(shape, qkv_bias)) | (mlp or gated_tensors)(
                shape, index
            )
            layer |= {f"{norm}.{kind}": (shape.hidden,) for norm in norms for kind in kinds}
            if head_norms:
                names = head_norms if isinstance(head_norms, tuple) else ("q_norm", "k_norm")
                layer |= {f"self_attn.{norm}.weight": (shape.head_dim,) for norm in names}
            if row_norms:
                layer |= {"self_attn.q_norm.weight": (shape.q_row,), "self_attn.k_norm.weight": (shape.kv_row,)}
            found |= {f"model.layers.{index}.{name}": size for name, size in layer.items()}
        found |= {f"model.norm.{kind}": (shape.hidden,) for kind in kinds}
        return found if shape.tied else found | {"lm_head.weight": (shape.vocab, shape.hidden)}

    return tensors


def gated_tensors(shape: Geometry, layer: int) -> dict[str, Shape]:
    """Of an MLP of gate, up and down."""
    inner, hidden = shape.intermediate, shape.hidden
    return with_biases({GATE: (inner, hidden), UP: (inner, hidden), DOWN: (hidden, inner)}, shape.mlp_bias)


def _attention(shape: Geometry, qkv_bias: bool) -> dict[str, Shape]:
    q, kv, hidden = shape.q_row, shape.kv_row, shape.hidden
    read = with_biases({Q: (q, hidden), K: (kv, hidden), V: (kv, hidden)}, qkv_bias or shape.attention_bias)
    return read | with_biases({O: (hidden, q)}, shape.attention_bias and not qkv_bias)


def with_biases(sizes: Mapping[str, tuple[int, int]], biased: bool) -> dict[str, Shape]:
    """Tensors of matrices of these sizes, and a bias of each where they are ``biased``."""
    weights: dict[str, Shape] = {f"{name}.weight": size for name, size in sizes.items()}
    return weights | {f"{name}.bias": (size[0],) for name, size in sizes.items() if biased}
