"""The Triton twin of kquant_refit.refit: one launch for a super-block of all rows."""

from __future__ import annotations

# Kernels carry no annotations: Triton would compile them (pyproject.toml tells mypy).
import triton
import triton.language as tl
from torch import Tensor

from qtool.quantize.methods.kquant_columns import BlockColumns

ROWS, WARPS = 32, 1


@triton.jit
def _count(value, unit):
    """kquant_blocks.count_of."""
    count = tl.div_rn(value, tl.where(unit == 0, 1.0, unit))
    return tl.where(unit == 0, 0.0, (count + 12582912.0) - 12582912.0)


@triton.jit
def _half_positive(value, step):
    """kquant_refit._half_positive."""
    moved = tl.minimum(tl.maximum(value + step, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
    return tl.where(moved * value > 0, moved, value)


@triton.jit
def _of_d(codes, scale, unit, sub, row, out, size: tl.constexpr):
    """How much a sub-block's weights are of d ``[size, rows]``."""
    mask = row < out
    step = _count(tl.load(scale + sub * out + row, mask=mask, other=0.0), unit)
    at = (sub * size + tl.arange(0, size))[:, None] * out + row[None, :]
    return tl.load(codes + at, mask=mask[None, :], other=0.0) * step[None, :]


@triton.jit
def _of_dmin(shift, unit, sub, row, out, size: tl.constexpr):
    """How much they are of dmin."""
    count = _count(tl.load(shift + sub * out + row, mask=row < out, other=0.0), unit)
    return tl.zeros([size, row.shape[0]], tl.float32) - count[None, :]


@triton.jit
def _solve(a, b, dd, mm, dm):
    """The least-squares changes of d and dmin; of d alone where the two cannot be told apart."""
    both = dd * mm - dm * dm
    sound = both > 1e-6 * dd * mm
    over = 1.0 / tl.maximum(both, 1e-30)
    by_d = tl.where(sound, (dm * b - mm * a) * over, -a / tl.maximum(dd, 1e-30))
    return by_d, tl.where(sound, (dm * a - dd * b) * over, 0.0)


@triton.jit
def _refit_kernel(
    codes, scale, shift, d, dmin, slope, metric, out, subs, between_codes, between_scales, between_units,
    size: tl.constexpr, affine: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    row, problem = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1).to(tl.int64)
    mask, within, width = row < out, tl.arange(0, size), subs * size
    codes, slope = codes + problem * between_codes, slope + problem * width * out
    metric += problem * width * width
    scale, shift = scale + problem * between_scales, shift + problem * between_scales
    d, dmin = d + problem * between_units, dmin + problem * between_units
    unit, shift_unit = tl.load(d + row, mask=mask, other=1.0), tl.load(dmin + row, mask=mask, other=1.0)
    a, b = tl.zeros_like(unit), tl.zeros_like(unit)
    dd, mm, dm = tl.zeros_like(unit), tl.zeros_like(unit), tl.zeros_like(unit)
    for sub in range(subs):
        of_d, of_dmin = _of_d(codes, scale, unit, sub, row, out, size), tl.zeros([size, rows], tl.float32)
        d_product, dmin_product = tl.zeros([size, rows], tl.float32), tl.zeros([size, rows], tl.float32)
        for other in range(subs):
            block = tl.load(metric + (sub * size + within)[:, None] * width + (other * size + within)[None, :])
            tile = _of_d(codes, scale, unit, other, row, out, size)
            d_product = tl.dot(block, tile, d_product, input_precision="tf32")
            if affine:
                tile = _of_dmin(shift, shift_unit, other, row, out, size)
                dmin_product = tl.dot(block, tile, dmin_product, input_precision="tf32")
        half = tl.load(slope + (sub * size + within)[:, None] * out + row[None, :], mask=mask[None, :], other=0.0)
        a, dd = a + tl.sum(of_d * half, axis=0), dd + tl.sum(of_d * d_product, axis=0)
        if affine:
            of_dmin = _of_dmin(shift, shift_unit, sub, row, out, size)
            b, mm = b + tl.sum(of_dmin * half, axis=0), mm + tl.sum(of_dmin * dmin_product, axis=0)
            dm += tl.sum(of_d * dmin_product, axis=0)
    by_d, by_dmin = _solve(a, b, dd, mm, dm)
    by_d, by_dmin = _half_positive(unit, by_d) - unit, _half_positive(shift_unit, by_dmin) - shift_unit
    change = 2 * (by_d * a + by_dmin * b) + by_d * by_d * dd + by_dmin * by_dmin * mm + 2 * by_d * by_dmin * dm
    new_unit = tl.where(change < 0, unit + by_d, unit)
    new_shift_unit = tl.where(change < 0, shift_unit + by_dmin, shift_unit)
    tl.debug_barrier()
    tl.store(d + row, new_unit, mask=mask)
    tl.store(dmin + row, new_shift_unit, mask=mask)
    for sub in range(subs):
        at = sub * out + row
        count = _count(tl.load(scale + at, mask=mask, other=0.0), unit)
        tl.store(scale + at, count * new_unit, mask=mask)
        count = _count(tl.load(shift + at, mask=mask, other=0.0), shift_unit)
        tl.store(shift + at, count * new_shift_unit, mask=mask)


def refit(part: BlockColumns, slope: Tensor, metric: Tensor) -> None:
    """As `kquant_refit.refit`."""
    problems, out, kind = slope.shape[:-2], slope.shape[-1], part.kind
    gaps = [one.stride(0) if problems else 0 for one in (part.codes, part.scale, part.d)]
    _refit_kernel[(triton.cdiv(out, ROWS), len(slope) if problems else 1)](
        *part.numbers, slope, metric, out, part.scale.shape[-2], *gaps, kind.size, kind.affine, ROWS, num_warps=WARPS,
    )  # fmt: skip
