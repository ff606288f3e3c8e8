"""One decoder layer in llama.cpp's block formats: each linear in its planned type, weighed by channel importance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qtool import QtoolError
from qtool.convert.models.feeds import Matrix
from qtool.quantize.folding import LayerOutput, unquantized
from qtool.quantize.methods.ggml import fits, quantize_ggml

TINY = 1e-12  # its square times a weight's is still a normal float32


def quantize_layer(
    matrices: Sequence[Matrix],
    weights: Mapping[str, Tensor],
    types: Mapping[str, str],
    importance: Mapping[str, Tensor],
    device: torch.device,
) -> LayerOutput:
    """``weights``: tensor name -> tensor in the dtype of the checkpoint; ``types``: module -> ggml type;
    ``importance``: module -> mean square of each input channel, float32 ``[in]`` (empty: errors count alike).

    Records ``|W - Ŵ| / |W|`` and, where importance is known, the same with every column weighed by it: the relative
    output error on inputs whose channels are uncorrelated.
    """
    output = LayerOutput(tensors=unquantized(matrices, weights), importance=dict(importance))
    for matrix in matrices:
        linear = matrix.module
        weight = matrix.of(weights[matrix.tensor]).to(device)
        row = live(importance[linear].to(device)) if linear in importance else None
        if not fits(weight, types[linear]):
            raise QtoolError(f"{linear}: does not fit {types[linear]}, which ends at 65504; set `type: BF16`.")
        blocks = quantize_ggml(weight, types[linear], row)
        output.codes[linear] = blocks
        source = weight.float()
        error = blocks.dequantize().sub_(source).square_()
        power = source.square_()
        figures = {"frobenius": _ratio(error, power)}
        if row is not None:
            figures["weighted_error"] = _ratio(error * row, power * row)
        output.records[linear] = figures
    return output


def live(row: Tensor) -> Tensor:
    """``row [in]``, mean squares, without zeros: channels that no text moved count as the least that any channel
    counted; where a matrix saw nothing at all, all count alike.

    Where the weights that share a scale all count 0, or so little or much that the products leave float32, ggml finds
    no scale and writes zeros for them.
    """
    row = row.float()
    top = float(row.max())
    if top == 0:
        return torch.ones_like(row)
    if not TINY < top < 1 / TINY:
        row = row / top
    return row.clamp_min(float(row[row >= TINY].min()))


def _ratio(error: Tensor, power: Tensor) -> float:
    return float(f"{float((error.sum() / power.sum().clamp_min(1e-30)).sqrt()):.6g}")
