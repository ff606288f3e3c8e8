"""Phi-3, Phi-3.5 and Phi-4: q, k and v are one matrix, gate and up another; a part of every head is rotated."""

from __future__ import annotations

from qtool import QtoolError
from qtool.convert.models.family import SILU, Family, GgufFacts, Ropes, Settings, Windows
from qtool.convert.models.feeds import Feed, Heads, Norm, Shape, whole
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import QKV, O, decoder_tensors, fused_mlp, fused_tensors


def _attention(shape: Geometry) -> dict[str, Shape]:
    rows = shape.q_row + 2 * shape.kv_row
    return {f"{QKV}.weight": (rows, shape.hidden), f"{O}.weight": (shape.hidden, shape.q_row)}


def _feeds(shape: Geometry, layer: int) -> tuple[Feed, ...]:
    repeat, values = shape.heads // shape.kv_heads, shape.q_row + shape.kv_row
    return (
        Feed(Norm("input_layernorm"), (whole(QKV),)),
        Feed(Heads(whole(QKV), repeat, shape.head_dim, values, shape.kv_row), (whole(O),), split=True, adds=True),
        *fused_mlp("post_attention_layernorm", shape),
    )


def _refuse(settings: Settings, rope: Ropes) -> None:
    heads, size = settings["num_attention_heads"], settings.get("head_dim")
    if size is not None and heads * size != settings["hidden_size"]:
        raise QtoolError(f"config.json: {heads} heads of {size} numbers are not hidden_size {settings['hidden_size']}; "
                         "llama.cpp's phi3 has no other.")  # fmt: skip


PHI3 = Family(
    "Phi3ForCausalLM",
    decoder_tensors(attention=_attention, mlp=fused_tensors),
    _feeds,
    SILU,
    Windows("all"),
    {
        "hidden_act": "silu", "rope_theta": 1e4, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0,
    },
    partial_rotary=True,
    gguf=GgufFacts("phi3", refuse=_refuse, says=frozenset(("resid_pdrop", "embd_pdrop"))),
)  # fmt: skip
