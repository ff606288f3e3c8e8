"""Qwen 2 and 2.5, Qwen2.5-Coder among them: Llama with biases on q, k and v."""

from __future__ import annotations

from qtool.convert.models.family import SILU, Family, GgufFacts, Windows
from qtool.convert.models.parts import decoder_tensors, gated_decoder

DEFAULTS = {
    "hidden_act": "silu", "rope_theta": 1e4, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
WINDOWS = Windows("some", switched=True)

QWEN2 = Family(
    "Qwen2ForCausalLM",
    decoder_tensors(qkv_bias=True),
    gated_decoder(),
    SILU,
    WINDOWS,
    DEFAULTS,
    gguf=GgufFacts("qwen2", biases=True, like_70b=lambda shape: shape.layers == 80),  # its src/models/qwen2.cpp
)
