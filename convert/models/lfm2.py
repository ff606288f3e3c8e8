"""LFM2 of Liquid AI: gated short convolutions in most layers, attention in the others, a gated MLP behind either.

in_proj ──▶ B, C, x    out_proj(C · conv(B · x)): channel j of what enters out_proj is linear in row j of C, whether
                       the convolution has a bias or not, so C's rows absorb out_proj's scale
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qtool import QtoolError
from qtool.convert.models.experts import whole_number
from qtool.convert.models.family import FULL, SILU, Family, Settings, Windows
from qtool.convert.models.feeds import Feed, Heads, Norm, Rows, Shape, whole
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import K, Q, V, with_biases

_CONV = "conv"  # a kind of layers
_IN, _OUT, _KERNEL = "conv.in_proj", "conv.out_proj", "conv.conv"
_O = "self_attn.out_proj"
_GATE, _UP, _DOWN = (f"feed_forward.{name}" for name in ("w1", "w3", "w2"))


def _derived(settings: Settings) -> dict[str, Any]:
    layers = range(int(settings.get("num_hidden_layers") or 0))
    attends = settings.get("full_attn_idxs")
    chosen = set(attends) if isinstance(attends, list) else set(layers)
    return {"layer_types": [FULL if layer in chosen else _CONV for layer in layers]}


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    """A convolution looks back on as many tokens as it is long. Raises QtoolError for kinds of layers that are none."""
    kinds: Any = settings["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != shape.layers or not set(kinds) <= {FULL, _CONV}:
        raise QtoolError(
            f"config.json: layer_types is {kinds!r}; {shape.layers} times {FULL!r} or {_CONV!r} are needed."
        )
    length = whole_number(settings, "conv_L_cache", 2)
    return replace(
        shape,
        intermediate=_inner(settings, shape.intermediate),
        windows=tuple(None if kind == FULL else length for kind in kinds),
        conv_bias=bool(settings["conv_bias"]),
    )


def _inner(settings: Settings, said: int) -> int:
    """The MLP's channels: transformers' class takes two thirds of what config.json says, rounded up."""
    said = int(settings.get("block_ff_dim") or said)
    if not settings["block_auto_adjust_ff_dim"]:
        return said
    factor, multiple = settings["block_ffn_dim_multiplier"], whole_number(settings, "block_multiple_of")
    inner = int(2 * said / 3)
    return inner if factor is None else -(-int(factor * inner) // multiple) * multiple


def _tensors(shape: Geometry) -> dict[str, Shape]:
    hidden, inner = shape.hidden, shape.intermediate
    found: dict[str, Shape] = {"model.embed_tokens.weight": (shape.vocab, hidden)}
    for index, length in enumerate(shape.windows):
        layer: dict[str, Shape] = {f"{name}.weight": (inner, hidden) for name in (_GATE, _UP)}
        layer |= {f"{_DOWN}.weight": (hidden, inner), "operator_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
        if length is None:
            layer |= {f"{name}.weight": (shape.kv_row, hidden) for name in (K, V)}
            layer |= {f"{Q}.weight": (shape.q_row, hidden), f"{_O}.weight": (hidden, shape.q_row)}
            layer |= {f"self_attn.{norm}_layernorm.weight": (shape.head_dim,) for norm in "qk"}
        else:
            layer |= with_biases({_IN: (3 * hidden, hidden), _OUT: (hidden, hidden)}, shape.conv_bias)
            layer |= {f"{_KERNEL}.weight": (hidden, 1, length)}
            layer |= {f"{_KERNEL}.bias": (hidden,)} if shape.conv_bias else {}
        found |= {f"model.layers.{index}.{name}": size for name, size in layer.items()}
    found["model.embedding_norm.weight"] = (hidden,)
    return found if shape.tied else found | {"lm_head.weight": (shape.vocab, hidden)}


def _feeds(shape: Geometry, layer: int) -> tuple[Feed, ...]:
    before = Norm("operator_norm")
    if shape.windows[layer] is None:
        values = Heads(whole(V), shape.heads // shape.kv_heads, shape.head_dim)
        mixer = Feed(before, (whole(Q), whole(K), whole(V))), Feed(values, (whole(_O),), split=True, adds=True)
    else:
        gates = Rows(whole(_IN), shape.hidden, shape.hidden)
        mixer = Feed(before, (whole(_IN),)), Feed(gates, (whole(_OUT),), split=True, adds=True)
    return (
        *mixer,
        Feed(Norm("ffn_norm"), (whole(_GATE), whole(_UP))),
        Feed(Rows(whole(_UP)), (whole(_DOWN),), split=True, adds=True),
    )


LFM2 = Family(
    "Lfm2ForCausalLM",
    _tensors,
    _feeds,
    replace(SILU, key="_always"),  # no key of its config.json names it
    Windows("none"),
    {
        "rope_theta": 1e6, "num_key_value_heads": 8, "max_position_embeddings": 128000, "norm_eps": 1e-5,
        "conv_L_cache": 3, "conv_bias": False, "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256, "tie_word_embeddings": True,
    },
    aliases={"tie_embedding": "tie_word_embeddings"},
    derived=_derived,
    shape=_shape,
    final_norm="embedding_norm",
    no_gguf="cannot be written as GGUF yet: its header says a number of heads for each layer, and qtool one for all",
)  # fmt: skip
