"""Llama, and what is built as it is: Mistral and IQuest-Coder."""

from __future__ import annotations

from qtool.convert.models.family import SILU, Family, GgufFacts, Windows
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import decoder_tensors, gated_decoder


def _like_70b(shape: Geometry) -> bool:  # load_arch_hparams of llama.cpp's src/models/llama.cpp
    return shape.layers == 80 and shape.heads != shape.kv_heads


_GGUF = GgufFacts("llama", permuted=True, biases=True, factors=True, like_70b=_like_70b)

_DEFAULTS = {"hidden_act": "silu", "rope_theta": 1e4}

LLAMA = Family(
    "LlamaForCausalLM",
    decoder_tensors(),
    gated_decoder(),
    SILU,
    Windows("none"),
    _DEFAULTS | {"max_position_embeddings": 2048},
    gguf=_GGUF,
)
MISTRAL = Family(
    "MistralForCausalLM",
    decoder_tensors(),
    gated_decoder(),
    SILU,
    Windows("all"),
    _DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    gguf=_GGUF,
)
_OWN_CODE = {  # configuration_iquestcoder.py
    "hidden_act": "silu", "rope_theta": 5e5, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 16384, "max_window_layers": 0,
}  # fmt: skip
IQUEST_CODER = Family(
    "IQuestCoderForCausalLM",
    decoder_tensors(),
    gated_decoder(),
    SILU,
    Windows("some", switched=True),
    _OWN_CODE,
    built_as="LlamaForCausalLM",
    gguf=_GGUF,
)
