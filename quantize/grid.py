"""Uniform grids: fit a scale and a zero to each group of weights, round to nearest, dequantize.

``w ~ (q - zero) * scale`` with integer q in 0 .. 2**bits - 1. Shapes: weights ``[out, in]``, scale and zero
``[out, in / group_size]`` float32, or stacks ``[E, …]`` of them; the scale is always rounded to the dtype it is stored
in before a code is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.convert.formats.codes import UniformCodes

CLIP_STEP, CLIP_STEPS = 0.03, 14  # the range shrinks to no less than 0.61
KERNEL_GROUP = 128  # the accelerator's kernels hold a whole group in registers; larger ones take plain PyTorch


@dataclass(frozen=True)
class GridSpec:
    """What a container can store. ``group_size`` -1: a row is one group; `for_columns` says how many that are."""

    bits: int
    group_size: int
    sym: bool
    dtype: torch.dtype

    @property
    def levels(self) -> int:
        return (1 << self.bits) - 1

    def for_columns(self, columns: int) -> GridSpec:
        """The same with the group size in columns."""
        return self if self.group_size > 0 else replace(self, group_size=columns)


@dataclass(frozen=True)
class Grid:
    """Scale and zero of each group, float32 ``[out, groups]``."""

    scale: Tensor
    zero: Tensor


def fit_minmax(weight: Tensor, spec: GridSpec, ratio: float = 1.0) -> Grid:
    """The grid that covers each group's range (shrunk by ``ratio``). Asymmetric ranges contain zero, as AutoAWQ's do;
    symmetric ones are ``2 * absmax / levels`` wide with the zero in the middle, as AutoGPTQ's are."""
    grouped = weight.unflatten(-1, (-1, spec.group_size))
    low, high = torch.aminmax(grouped, dim=-1)
    return grid_from_range(low * ratio, high * ratio, spec)


def grid_from_range(low: Tensor, high: Tensor, spec: GridSpec) -> Grid:
    """The grid that covers low .. high, as `fit_minmax` says."""
    if spec.sym:
        high = torch.maximum(high, -low).clamp_min(0)
        low = -high
    else:
        low, high = low.clamp_max(0), high.clamp_min(0)
    scale = stored((high - low).clamp_min(1e-5) / spec.levels, spec.dtype)
    if spec.sym:
        zero = torch.full_like(scale, (spec.levels + 1) // 2)
    else:
        zero = torch.round(-low / scale).clamp_(0, spec.levels)
    return Grid(scale, zero)


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale as a reader will see it, float32; never zero, so that a group of tiny weights stays finite."""
    return scale.to(dtype).float().clamp_min(torch.finfo(dtype).smallest_normal)


def quantize(weight: Tensor, grid: Grid, spec: GridSpec) -> Tensor:
    """Nearest codes, float32 ``[out, in]`` holding integers."""
    grouped = weight.unflatten(-1, (-1, spec.group_size))
    codes = grouped / grid.scale.unsqueeze(-1)
    return torch.flatten(codes.round_().add_(grid.zero.unsqueeze(-1)).clamp_(0, spec.levels), -2)


def dequantize(codes: Tensor, grid: Grid, spec: GridSpec) -> Tensor:
    """Weights back, float32 ``[out, in]``."""
    grouped = codes.unflatten(-1, (-1, spec.group_size))
    return torch.flatten((grouped - grid.zero.unsqueeze(-1)) * grid.scale.unsqueeze(-1), -2)


def minus_zeros(codes: Tensor, grid: Grid) -> Tensor:
    """Codes ``[out, in]`` counted from their groups' zeros."""
    grouped = codes.unflatten(-1, (grid.zero.shape[-1], -1))
    return torch.flatten(grouped - grid.zero.unsqueeze(-1), -2)


def round_to_nearest(weight: Tensor, spec: GridSpec) -> Tensor:
    """Quantize and dequantize on the min/max grid, float32 ``[out, in]``."""
    grid = fit_minmax(weight, spec)
    return dequantize(quantize(weight, grid, spec), grid, spec)


def fit_clipped(weight: Tensor, blocks: Tensor, spec: GridSpec) -> Grid:
    """The grid, of those on ranges shrunk step by step, with the least output error of its own group.

    ``blocks [groups, group_size, group_size]``: the diagonal blocks of the Gram matrix; the error of a group with
    residual e is ``e B eᵀ``. The search of AWQ (arXiv 2306.00978, §3.2, weight clipping) without running a forward.
    A stack ``[E, out, in]`` has blocks ``[groups, E, group_size, group_size]``.
    """
    if weight.ndim == 3:
        fitted = [fit_clipped(one, blocks[:, number], spec) for number, one in enumerate(weight)]
        return Grid(torch.stack([one.scale for one in fitted]), torch.stack([one.zero for one in fitted]))
    groups = weight.split(spec.group_size, dim=1)
    fits = [_fit_group(group, block, spec) for group, block in zip(groups, blocks, strict=True)]
    return Grid(torch.cat([scale for scale, _ in fits], 1), torch.cat([zero for _, zero in fits], 1))


def _fit_group(weight: Tensor, metric: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero ``[out, 1]`` of one group ``[out, g]``."""
    if weight.is_cuda and spec.group_size <= KERNEL_GROUP:
        from qtool.quantize.kernels import fit_clipped as fit_group

        half = spec.dtype == torch.float16
        return fit_group(weight, metric, spec.levels, spec.sym, half, CLIP_STEPS, CLIP_STEP)
    columns = weight.t().contiguous()
    ratio = 1.0 - CLIP_STEP * torch.arange(CLIP_STEPS, device=weight.device).unsqueeze(1)
    grids = grid_from_range(columns.amin(0) * ratio, columns.amax(0) * ratio, spec)  # [steps, out]
    error, product = torch.empty_like(columns), torch.empty_like(columns)
    losses = []
    for scale, zero in zip(grids.scale, grids.zero, strict=True):
        column_errors(columns, Grid(scale, zero), spec, error)
        losses.append(torch.mm(metric, error, out=product).mul_(error).sum(0))
    best = torch.stack(losses).argmin(0, keepdim=True)
    return grids.scale.gather(0, best).t(), grids.zero.gather(0, best).t()


def column_errors(columns: Tensor, grid: Grid, spec: GridSpec, out: Tensor) -> Tensor:
    """``Q(w) - w`` into ``out``, for weights ``[..., g, out]`` that lie column by column, so that the grid
    (``[..., 1, out]``) is contiguous along the rows; a reciprocal instead of a division, for searches."""
    torch.mul(columns, 1.0 / grid.scale, out=out).round_()
    torch.clamp(out, -grid.zero, spec.levels - grid.zero, out=out)
    return out.mul_(grid.scale).sub_(columns)


def diagonal_blocks(gram: Tensor, group_size: int) -> Tensor:
    """``[in, in]`` -> ``[in / g, g, g]``; ``[E, in, in]`` -> ``[in / g, E, g, g]``."""
    groups = gram.shape[-1] // group_size
    view = gram.unflatten(-1, (groups, group_size)).unflatten(-3, (groups, group_size))
    return torch.diagonal(view, dim1=-4, dim2=-2).movedim(-1, 0).contiguous()


def to_codes(codes: Tensor, grid: Grid, spec: GridSpec) -> UniformCodes:
    """Float integers and a grid -> what the writers take."""
    return UniformCodes(
        codes.to(torch.uint8), grid.scale.to(spec.dtype), grid.zero.to(torch.uint8), spec.bits, spec.group_size
    )
