"""The two numbers of a super-block, d and dmin, by least squares, all its integers held.

On an accelerator the Triton twin does it in one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.quantize.methods.kquant_blocks import count_of
from qtool.quantize.methods.kquant_candidates import HALF_MAX
from qtool.quantize.methods.kquant_columns import BlockColumns

TINY = 1e-30


def refit(part: BlockColumns, slope: Tensor, metric: Tensor) -> None:
    """Change d and dmin where that lowers the loss. ``slope [256, out]``: half its gradient at the block's weights;
    ``metric [256, 256]``: of its columns."""
    if slope.is_cuda:
        from qtool.quantize.methods import kquant_refit_kernels

        of_each = metric if metric.ndim == slope.ndim else metric.expand(len(slope), *metric.shape).contiguous()
        kquant_refit_kernels.refit(part, slope, of_each)
        return
    kind, d, dmin = part.kind, part.d, part.dmin
    steps, minima = count_of(part.scale, d), count_of(part.shift, dmin)
    of_d = (part.codes.unflatten(-2, (-1, kind.size)) * steps.unsqueeze(-2)).flatten(-3, -2)
    of_dmin = -minima.repeat_interleave(kind.size, -2)
    d_product, dmin_product = metric @ of_d, metric @ of_dmin
    a, b = (of_d * slope).sum(-2, keepdim=True), (of_dmin * slope).sum(-2, keepdim=True)
    dd, mm = (of_d * d_product).sum(-2, keepdim=True), (of_dmin * dmin_product).sum(-2, keepdim=True)
    dm = (of_d * dmin_product).sum(-2, keepdim=True)
    both = dd * mm - dm * dm
    sound = both > 1e-6 * dd * mm
    by_d = torch.where(sound, (dm * b - mm * a) / both.clamp_min(TINY), -a / dd.clamp_min(TINY))
    by_dmin = torch.where(sound, (dm * a - dd * b) / both.clamp_min(TINY), 0.0)
    by_d = _half_positive(d, by_d) - d
    by_dmin = _half_positive(dmin, by_dmin) - dmin
    change = 2 * (by_d * a + by_dmin * b) + by_d**2 * dd + by_dmin**2 * mm + 2 * by_d * by_dmin * dm
    helps = change < 0
    d += torch.where(helps, by_d, 0.0)
    dmin += torch.where(helps, by_dmin, 0.0)
    torch.mul(steps, d, out=part.scale)
    torch.mul(minima, dmin, out=part.shift)


def _half_positive(value: Tensor, step: Tensor) -> Tensor:
    """``value + step`` as float16, where that keeps its sign; else ``value``."""
    moved = (value + step).clamp(-HALF_MAX, HALF_MAX).half().float()
    return torch.where(moved * value > 0, moved, value)
