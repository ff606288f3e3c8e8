"""What rounding on a uniform grid cost a matrix, beside plain rounding: the figures of a layer's ledger."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from qtool.quantize import grid as grids
from qtool.quantize import scaling
from qtool.quantize.crew import Crew
from qtool.quantize.precision import tensor_float32


def records_of(
    source: Tensor, error: Tensor, nearest: bool, gram: Tensor, scale: Tensor, spec: grids.GridSpec, crew: Crew
) -> list[dict[str, float]]:
    """Of a matrix, or of each expert's of a stack. ``error``: of the scaled weight; ``nearest``: by plain rounding;
    ``gram``: of the scaled inputs. W s meets X / s, so its output errors are those of the source's own weights and
    inputs."""
    scale = scale.unsqueeze(-2)

    def energy() -> Tensor:
        with tensor_float32():
            return scaling.output_error(source * scale, gram).clamp_min(1e-30)

    def of_nearest() -> Tensor:
        with tensor_float32():
            return scaling.output_error(grids.round_to_nearest(source, spec).sub_(source).mul_(scale), gram)

    def own() -> Tensor:
        with tensor_float32() if nearest else nullcontext():
            return scaling.output_error(error, gram)

    whole, plain, loss = crew.figures([energy, of_nearest, own], gram[..., 0, 0])
    figures = [
        (plain.clamp_min(0) / whole).sqrt(),
        (loss.clamp_min(0) / whole).sqrt(),
        _length(error.div_(scale)) / _length(source).clamp_min(1e-30),
    ]
    rows = torch.stack([figure.view(-1) for figure in figures], 1).tolist()
    names = ("rtn_error", "error", "frobenius")
    return [dict(zip(names, (float(f"{figure:.6g}") for figure in row), strict=True)) for row in rows]


def _length(values: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(values, dim=(-2, -1))
    return length
