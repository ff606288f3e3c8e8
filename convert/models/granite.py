"""Granite 3: Llama whose embedding, attention scores, residuals and logits are multiplied by numbers of config.json.

No scale of a matrix changes by them: each multiplies all channels alike.
"""

from __future__ import annotations

from qtool import QtoolError
from qtool.convert.models.family import SILU, Family, GgufFacts, Ropes, Settings, Value, Windows
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import decoder_tensors, gated_decoder

# config.json's key -> llama.cpp's (its src/models/granite.cpp)
_MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale", "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
}  # fmt: skip


def _keys(settings: Settings, shape: Geometry, rope: Ropes) -> dict[str, Value]:
    return {key: float(settings[name]) for name, key in _MULTIPLIERS.items()}


def _refuse(settings: Settings, rope: Ropes) -> None:
    for name in _MULTIPLIERS:
        if not settings[name]:
            raise QtoolError(f"config.json: {name} is 0, which llama.cpp's granite takes for a multiplier not given.")


GRANITE = Family(
    "GraniteForCausalLM",
    decoder_tensors(),
    gated_decoder(adds=False),  # outputs are multiplied before they are added
    SILU,
    Windows("none"),
    {"hidden_act": "silu", "rope_theta": 1e4, "max_position_embeddings": 2048, **dict.fromkeys(_MULTIPLIERS, 1.0)},
    gguf=GgufFacts(
        "granite",
        permuted=True,
        biases=True,
        factors=True,
        keys=_keys,
        required=tuple(_MULTIPLIERS.values()),
        refuse=_refuse,
        says=frozenset(_MULTIPLIERS),
    ),
)
