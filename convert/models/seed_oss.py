"""Seed-OSS: Llama with heads of a size of their own, and biases on q, k and v."""

from __future__ import annotations

from dataclasses import replace

from qtool import QtoolError
from qtool.convert.models.family import SILU, Family, GgufFacts, Ropes, Settings, Windows
from qtool.convert.models.feeds import Shape
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import decoder_tensors, gated_decoder


def _tensors(shape: Geometry) -> dict[str, Shape]:
    found = decoder_tensors(qkv_bias=shape.attention_bias)(shape)
    if shape.output_bias:
        for layer in range(shape.layers):
            found[f"model.layers.{layer}.self_attn.o_proj.bias"] = (shape.hidden,)
    return found


def _refuse(settings: Settings, rope: Ropes) -> None:
    for key in ("attention_out_bias", "mlp_bias"):
        if settings.get(key):
            raise QtoolError(f"config.json: {key} is set; llama.cpp's seed_oss has no such bias.")


SEED_OSS = Family(
    "SeedOssForCausalLM",
    _tensors,
    gated_decoder(),
    SILU,
    Windows("none"),
    {
        "hidden_act": "silu", "rope_theta": 1e4, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True,
        "max_position_embeddings": 524288,
    },
    shape=lambda settings, shape: replace(
        shape,
        attention_bias=bool(settings["attention_bias"]),
        output_bias=bool(settings.get("attention_out_bias")),
    ),
    gguf=GgufFacts(
        "seed_oss",
        biases=True,
        refuse=_refuse,
        says=frozenset(("attention_out_bias", "residual_dropout")),
    ),
)  # fmt: skip
