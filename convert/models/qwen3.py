"""Qwen 3: Qwen 2 without biases, with a norm over each head of q and k. No scale passes these."""

from __future__ import annotations

from qtool.convert.models.family import SILU, Family, GgufFacts
from qtool.convert.models.parts import decoder_tensors, gated_decoder
from qtool.convert.models.qwen2 import DEFAULTS, WINDOWS

QWEN3 = Family(
    "Qwen3ForCausalLM",
    decoder_tensors(head_norms=True),
    gated_decoder(),
    SILU,
    WINDOWS,
    DEFAULTS | {"head_dim": 128},
    gguf=GgufFacts("qwen3"),
)
