"""IQuest-Coder's Loop models: Llama's layers, through which every token passes twice. The second pass attends to the
first one's cache and, through a gate of each layer, to its own window (`loop_code`).

No scale goes into q or k, whose rotated queries the gate reads. All other folds hold in both passes: the matrices are
the same, and the gate weighs whole heads, so that values keep their channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qtool import QtoolError
from qtool.convert.models.family import SILU, Family, Settings, Windows
from qtool.convert.models.feeds import Shape
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import decoder_tensors, gated_decoder


def _shape(settings: Settings, shape: Geometry) -> Geometry:
    loops, window = (int(settings[key]) for key in ("loop_num", "loop_window_size"))
    for key, value in (("loop_num", loops), ("loop_window_size", window)):
        if value < 1:
            raise QtoolError(f"config.json: {key} is {value}; a positive whole number is needed.")
    return replace(shape, loops=loops, loop_window=window if loops > 1 else 0)


def _tensors(shape: Geometry) -> dict[str, Shape]:
    found = decoder_tensors()(shape)
    for index in range(shape.layers):
        found[f"model.gate_projections.{index}.weight"] = (shape.heads, shape.head_dim)
        found[f"model.gate_projections.{index}.bias"] = (shape.heads,)
    return found


def _register() -> Any:
    from qtool.convert.models import loop_code  # transformers' models take seconds to import

    return loop_code.register()


IQUEST_LOOP_CODER = Family(
    "IQuestLoopCoderForCausalLM",
    _tensors,
    gated_decoder(),
    SILU,
    Windows("none"),
    {"hidden_act": "silu", "rope_theta": 1e4, "loop_num": 2, "loop_window_size": 64},
    shape=_shape,
    unlike_layers=("gate_projections",),
    register=_register,
    vllm_names_fused=False,
    no_gguf="cannot be written as GGUF: llama.cpp has no looped decoder",
)
