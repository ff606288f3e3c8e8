"""What an output keeps of one decoder layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtool.convert.formats.codes import Codes


@dataclass
class LayerOutput:
    """What one output keeps of one layer; names are relative to the layer.

    codes: linear -> codes. tensors: every other tensor, float32, folded. columns, rows: linear -> what its columns were
    multiplied by ``[in]`` and its rows divided by ``[out]`` (empty where nothing is folded). records: linear -> errors.
    importance: linear -> mean square of its input channels ``[in]`` (only where blocks were weighed by it).
    """

    codes: dict[str, Codes] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    records: dict[str, dict[str, float]] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)

    def dequantized(self, dtype: torch.dtype, stored: torch.dtype) -> dict[str, Tensor]:
        """The layer's state dict as a reader of the artifact gets it."""
        state = {name: tensor.to(stored).to(dtype) for name, tensor in self.tensors.items()}
        return state | {f"{linear}.weight": codes.dequantize(dtype) for linear, codes in self.codes.items()}
