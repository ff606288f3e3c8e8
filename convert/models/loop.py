"""IQuest-Coder's Loop models: Llama's layers, through which every token passes twice. The second pass attends to the
first one's cache and, through a gate of each layer, to its own window (vLLM models/iquest_loopcoder.py)."""

from __future__ import annotations

from dataclasses import replace

from qtool.convert.models.family import SILU, Family, Settings, Windows
from qtool.convert.models.feeds import Shape, Visit
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import decoder_tensors, gated_decoder


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    loops = int(settings.get("loop_num") or 2)
    return replace(shape, loops=loops, loop_window=int(settings.get("loop_window_size") or 64) if loops > 1 else 0)


def _tensors(shape: Geometry) -> dict[str, Shape]:
    found = decoder_tensors()(shape)
    for index in range(shape.layers):
        found[f"model.gate_projections.{index}.weight"] = (shape.heads, shape.head_dim)
        found[f"model.gate_projections.{index}.bias"] = (shape.heads,)
    return found


def _visits(shape: Geometry) -> tuple[Visit, ...]:
    return tuple(Visit(layer, turn) for turn in range(shape.loops) for layer in range(shape.layers))


IQUEST_LOOP_CODER = Family(
    "IQuestLoopCoderForCausalLM",
    _tensors,
    gated_decoder(),
    SILU,
    Windows("some"),
    shape=_shape,
    visits=_visits,
    no_gguf="cannot be written as GGUF: llama.cpp has no looped decoder",
    planned_only="a looped model, which qtool plans and does not quantize yet: no calibration goes through it twice",
)
