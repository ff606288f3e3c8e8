"""StarCoder 2: LayerNorms with biases, biases everywhere, and an MLP without a gate."""

from __future__ import annotations

from dataclasses import replace

from qtool import QtoolError
from qtool.convert.models.family import TANH_GELU, Family, GgufFacts, Ropes, Settings, Windows
from qtool.convert.models.feeds import Feed, Norm, Nothing, Shape, whole
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import attention_feeds, decoder_tensors, with_biases

FC, PROJ = "mlp.c_fc", "mlp.c_proj"


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    biased = bool(settings["use_bias"])
    return replace(shape, attention_bias=biased, mlp_bias=biased, mlp_matrices=2)


def _mlp(shape: Geometry, layer: int) -> dict[str, Shape]:
    inner, hidden = shape.intermediate, shape.hidden
    return with_biases({FC: (inner, hidden), PROJ: (hidden, inner)}, shape.mlp_bias)


def _feeds(shape: Geometry, layer: int) -> tuple[Feed, ...]:
    return (
        *attention_feeds(shape),
        Feed(Norm("post_attention_layernorm"), (whole(FC),)),
        Feed(Nothing(), (whole(PROJ),), split=True, adds=True),  # gelu lies between: no scale passes it
    )


def _refuse(settings: Settings, rope: Ropes) -> None:
    if not settings["use_bias"]:
        raise QtoolError("config.json: use_bias is false; llama.cpp's starcoder2 always has biases.")
    heads, size = settings["num_attention_heads"], settings.get("head_dim")
    if size is not None and heads * size != settings["hidden_size"]:
        raise QtoolError(f"config.json: {heads} heads of {size} numbers are not hidden_size {settings['hidden_size']}; "
                         "llama.cpp's starcoder2 has no other.")  # fmt: skip


STARCODER2 = Family(
    "Starcoder2ForCausalLM",
    decoder_tensors(mlp=_mlp, norm_biases=True),
    _feeds,
    replace(TANH_GELU, key="hidden_act"),
    Windows("all"),
    {
        "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 2, "max_position_embeddings": 4096, "use_bias": True,
        "tie_word_embeddings": True, "rope_theta": 1e4, "norm_epsilon": 1e-5,
    },
    shape=_shape,
    gguf=GgufFacts(
        "starcoder2",
        biases=True,
        epsilon=("norm_epsilon", "attention.layer_norm_epsilon"),
        refuse=_refuse,
        says=frozenset(("use_bias", "norm_epsilon", "residual_dropout", "embedding_dropout")),
    ),
)  # fmt: skip
