"""Triton kernels for the hot loops on an accelerator. Each does what its plain PyTorch twin in grid.py / gptq.py does.

round_block    gptq._round_block      one launch rounds a whole group of columns with error compensation
fit_clipped    grid.fit_clipped       one launch searches the clipping ratio of every row of a group
scaled_error   awq._scaled_error      W - Q(W s)/s without writing what lies between
"""

from __future__ import annotations

# Kernels carry no annotations: Triton would compile them (pyproject.toml tells mypy).
import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32


@triton.jit
def _nearest(x):
    """Round half to even, as torch.round: adding and taking away 1.5 * 2**23 leaves an integer for |x| < 2**22."""
    magic = 12582912.0
    return tl.where(tl.abs(x) < 4194304.0, (x + magic) - magic, x)


@triton.jit
def _store_scale(scale, half: tl.constexpr):
    """The scale as float16 or bfloat16 will hold it, never zero."""
    if half:
        rounded = tl.maximum(scale.to(tl.float16).to(tl.float32), 6.103515625e-05)
    else:
        rounded = tl.maximum(scale.to(tl.bfloat16).to(tl.float32), 1.1754943508222875e-38)
    return rounded


@triton.jit
def _fit(low, high, levels: tl.constexpr, sym: tl.constexpr, half: tl.constexpr):
    """Scale and zero of a range, as grid._grid_from_range."""
    if sym:
        high = tl.maximum(tl.maximum(high, -low), 0.0)
        low = -high
    else:
        low = tl.minimum(low, 0.0)
        high = tl.maximum(high, 0.0)
    scale = _store_scale(tl.div_rn(tl.maximum(high - low, 1e-5), tl.zeros_like(low) + levels), half)
    if sym:
        zero = tl.zeros_like(scale) + (levels + 1) // 2
    else:
        zero = tl.minimum(tl.maximum(_nearest(tl.div_rn(-low, scale)), 0.0), levels)
    return scale, zero


@triton.jit
def _round_block_kernel(
    block, upper, scale, zero, codes, errors, out, count,
    columns: tl.constexpr, levels: tl.constexpr, rows: tl.constexpr, by_column: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.arange(0, columns)
    inside = row < out
    place = column[:, None] * out + row[None, :]
    tile = tl.load(block + place, mask=(column < count)[:, None] & inside[None, :], other=0.0)
    s = tl.load(scale + row, mask=inside, other=1.0)
    z = tl.load(zero + row, mask=inside, other=0.0)
    for i in range(count):
        if by_column:
            s = tl.load(scale + i * out + row, mask=inside, other=1.0)
            z = tl.load(zero + i * out + row, mask=inside, other=0.0)
        weight = tl.sum(tl.where(column[:, None] == i, tile, 0.0), axis=0)
        code = tl.minimum(tl.maximum(_nearest(tl.div_rn(weight, s)) + z, 0.0), levels)
        pivot = tl.load(upper + i * count + i)
        error = (weight - (code - z) * s) / pivot
        tl.store(codes + i * out + row, code, mask=inside)
        tl.store(errors + i * out + row, error, mask=inside)
        following = tl.load(upper + i * count + column, mask=column < count, other=0.0)
        tile -= following[:, None] * error[None, :]


def round_block(block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """``block [n, out]``, ``upper [n, n]``, ``scale`` and ``zero`` ``[1, out]`` or ``[n, out]`` -> codes and scaled
    errors ``[n, out]``."""
    count, out = block.shape
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    _round_block_kernel[(triton.cdiv(out, ROWS),)](
        block, upper.contiguous(), scale.contiguous(), zero.contiguous(), codes, errors, out, count,
        triton.next_power_of_2(count), levels, ROWS, scale.shape[0] > 1, num_warps=4,
    )  # fmt: skip
    return codes, errors


@triton.jit
def _fit_clipped_kernel(
    weight, metric, scale, zero, out, stride, ratios, step,
    columns: tl.constexpr, levels: tl.constexpr, sym: tl.constexpr, half: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.arange(0, columns)
    inside = row < out
    tile = tl.load(weight + row[:, None] * stride + column[None, :], mask=inside[:, None], other=0.0)
    m = tl.load(metric + column[:, None] * columns + column[None, :])
    low, high = tl.min(tile, axis=1), tl.max(tile, axis=1)
    best_scale, best_zero = _fit(low, high, levels, sym, half)
    best_loss = tl.zeros_like(low) + float("inf")
    for number in range(ratios):
        ratio = 1.0 - step * number
        s, z = _fit(low * ratio, high * ratio, levels, sym, half)
        code = tl.minimum(
            tl.maximum(_nearest(tl.div_rn(tile, s[:, None] + tl.zeros_like(tile))) + z[:, None], 0.0), levels
        )
        error = (code - z[:, None]) * s[:, None] - tile
        loss = tl.sum(tl.dot(error, m, input_precision="tf32x3") * error, axis=1)
        better = loss < best_loss
        best_loss = tl.where(better, loss, best_loss)
        best_scale = tl.where(better, s, best_scale)
        best_zero = tl.where(better, z, best_zero)
    tl.store(scale + row, best_scale, mask=inside)
    tl.store(zero + row, best_zero, mask=inside)


def fit_clipped(
    weight: Tensor, metric: Tensor, levels: int, sym: bool, half: bool, ratios: int, step: float
) -> tuple[Tensor, Tensor]:
    """One group: ``weight [out, g]`` (rows may be strided), ``metric [g, g]`` -> scale and zero ``[out, 1]``."""
    out, columns = weight.shape
    scale, zero = weight.new_empty(out, 1), weight.new_empty(out, 1)
    _fit_clipped_kernel[(triton.cdiv(out, ROWS),)](
        weight, metric.contiguous(), scale, zero, out, weight.stride(0), ratios, step, columns, levels, sym, half, ROWS,
        num_warps=4,
    )  # fmt: skip
    return scale, zero


@triton.jit
def _scaled_error_kernel(
    weight, factor, error, own, width, between,
    columns: tl.constexpr, levels: tl.constexpr, sym: tl.constexpr, half: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0) * rows + tl.arange(0, rows)
    row = tl.program_id(2) * own + local
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    inside = (local < own)[:, None]
    tile = tl.load(weight + place, mask=inside, other=0.0)
    factors = tl.load(factor + tl.program_id(2) * between + column)[None, :]
    scaled = tile * factors
    s, z = _fit(tl.min(scaled, axis=1), tl.max(scaled, axis=1), levels, sym, half)
    code = tl.minimum(
        tl.maximum(_nearest(tl.div_rn(scaled, s[:, None] + tl.zeros_like(scaled))) + z[:, None], 0.0), levels
    )
    tl.store(error + place, (code - z[:, None]) * s[:, None] / factors - tile, mask=inside)


def scaled_error(weight: Tensor, factor: Tensor, group_size: int, levels: int, sym: bool, half: bool) -> Tensor:
    """``Q(W s)/s - W`` for ``weight [out, in]`` float32 contiguous and ``factor [in]``; round to nearest on min/max. A
    stack ``[E, out, in]`` has one factor or ``[E, in]``."""
    own, width = weight.shape[-2:]
    error, factor = torch.empty_like(weight), factor.contiguous()
    grid = (triton.cdiv(own, 16), width // group_size, weight.numel() // (own * width))
    _scaled_error_kernel[grid](
        weight, factor, error, own, width, width if factor.ndim == 2 else 0, group_size, levels, sym, half, 16,
        num_warps=4,
    )  # fmt: skip
    return error
