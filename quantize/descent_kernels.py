"""The Triton twins of quantize.descent's two inner steps: ranking candidates, improving starts."""

from __future__ import annotations

# Kernels carry no annotations: Triton would compile them (pyproject.toml tells mypy).
from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

SIGNED, MIRRORED, RANGE, TABLE = range(4)  # how a scale is made of a range
FLOAT32, FLOAT16, BFLOAT16 = range(3)  # what a scale is stored as
STORED = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
ROWS, PART = 32, 16  # of a program, one thread a row; columns that are taken in turn before others hear of them
RANK_ROWS, RANK_PART, RANK_WARPS = 64, 32, 4
CELLS = 64  # of the range of a table: each has one middle between two levels at most


@triton.jit
def _store(scale, kind: tl.constexpr):
    """A scale of either sign as float16 or bfloat16 will hold it, never zero."""
    size = tl.abs(scale)
    if kind == 1:
        size = tl.maximum(size.to(tl.float16).to(tl.float32), 6.103515625e-05)
    if kind == 2:
        size = tl.maximum(size.to(tl.bfloat16).to(tl.float32), 1.1754943508222875e-38)
    return tl.where(scale < 0, -size, size)


@triton.jit
def _level(ratio, zero, cells, top: tl.constexpr, rule: tl.constexpr, count: tl.constexpr):
    """The level nearest to weight / scale. Adding and taking away 1.5 * 2**23 rounds half to even, as torch.round."""
    if rule == 3:
        cell = cells + tl.minimum(tl.maximum((ratio + 1) * (count // 2), 0), count - 1).to(tl.int32)
        above = ratio > tl.load(cell)
        level = tl.where(above, tl.load(cell + 2 * count), tl.load(cell + count))
    else:
        level = (tl.minimum(tl.maximum(ratio, -zero), top - zero) + 12582912.0) - 12582912.0
    return level


@triton.jit
def _covering(low, high, ratio, top: tl.constexpr, rule: tl.constexpr, kind: tl.constexpr):
    """quantize.descent.covering."""
    widest = tl.maximum(tl.maximum(high, -low), 1e-12) * ratio
    zero = tl.zeros_like(low)
    if rule == 0:
        scale = _store(tl.where(-low > high, widest, -widest) / ((top + 1) // 2), kind)
        zero += (top + 1) // 2
    elif rule == 1:
        scale = _store(widest * 2 / top, kind)
        zero += (top + 1) // 2
    elif rule == 2:
        low, high = tl.minimum(low, 0.0) * ratio, tl.maximum(high, 0.0) * ratio
        scale = _store(tl.maximum(high - low, 1e-5) / top, kind)
        zero = tl.minimum(tl.maximum((tl.div_rn(-low, scale) + 12582912.0) - 12582912.0, 0.0), top)
    else:
        scale = widest
    return scale, zero


@triton.jit
def _product(metric, tile, first, row, out, inside, columns: tl.constexpr, part: tl.constexpr):
    """``metric[first : first + part] @ tile`` for the rows of a program, ``[part, rows]``; tile ``[columns, out]``."""
    within = tl.arange(0, part)
    total = tl.zeros([part, row.shape[0]], tl.float32)
    for start in range(0, columns, part):
        block = tl.load(metric + (first + within)[:, None] * columns + (start + within)[None, :])
        at = (start + within).to(tl.int64)[:, None] * out + row[None, :]
        total = tl.dot(block, tl.load(tile + at, mask=inside, other=0.0), total, input_precision="tf32")
    return total


@triton.jit
def _error(aim, start, row, out, inside, s, z, cells, part: tl.constexpr, top: tl.constexpr, rule: tl.constexpr,
           count: tl.constexpr):  # fmt: skip
    """What plain rounding of a part of the aim leaves, ``[part, rows]``."""
    at = (start + tl.arange(0, part)).to(tl.int64)[:, None] * out + row[None, :]
    goal = tl.load(aim + at, mask=inside, other=0.0)
    ratio = tl.div_rn(goal, tl.where(s == 0, 1e-30, s)[None, :] + tl.zeros_like(goal))
    return _level(ratio, z[None, :], cells, top, rule, count) * s[None, :] - goal


@triton.jit
def _rank_kernel(
    aim, metric, ratios, cells, losses, scales, zeros, out,
    columns: tl.constexpr, part: tl.constexpr, top: tl.constexpr, rule: tl.constexpr, kind: tl.constexpr,
    count: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    # One program is one candidate of `rows` rows of a problem: what plain rounding to it loses.
    problem = tl.program_id(2)
    aim += problem.to(tl.int64) * columns * out
    metric += problem * columns * columns
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    number, column, within = tl.program_id(1), tl.arange(0, columns), tl.arange(0, part)
    inside = (row < out)[None, :]
    goal = tl.load(aim + column.to(tl.int64)[:, None] * out + row[None, :], mask=inside, other=0.0)
    s, z = _covering(tl.min(goal, axis=0), tl.max(goal, axis=0), tl.load(ratios + number), top, rule, kind)
    loss = tl.zeros_like(s)
    for first in range(0, columns, part):
        slope = tl.zeros([part, rows], tl.float32)
        for start in range(0, columns, part):
            block = tl.load(metric + (first + within)[:, None] * columns + (start + within)[None, :])
            error = _error(aim, start, row, out, inside, s, z, cells, part, top, rule, count)
            slope = tl.dot(block, error, slope, input_precision="tf32")
        loss += tl.sum(slope * _error(aim, first, row, out, inside, s, z, cells, part, top, rule, count), axis=0)
    at = (number * tl.num_programs(2) + problem) * out + row
    tl.store(losses + at, loss, mask=row < out)
    tl.store(scales + at, s, mask=row < out)
    tl.store(zeros + at, z, mask=row < out)


@triton.jit
def _round_part(
    level, moved, product, linear, metric, inverse, first, row, out, s, z, cells,
    columns: tl.constexpr, part: tl.constexpr, top: tl.constexpr, rule: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """Each column of a part in turn gets its best level, all others held. One thread has one row; all is loaded before
    the first step and stored after the last, because each step waits for the one before it."""
    inside = row < out
    over = 1.0 / tl.where(s == 0, 1e-30, s)
    olds = ()
    pulls = ()
    for number in tl.static_range(part):
        at = (first + number).to(tl.int64) * out + row
        olds += (tl.load(level + at, mask=inside, other=0.0),)  # type: ignore[assignment]  # a tuple of any length
        pull = tl.load(linear + at, mask=inside, other=0.0) + tl.load(product + at, mask=inside, other=0.0) * s
        pulls += (pull,)  # type: ignore[assignment]
    news = ()
    for number in tl.static_range(part):
        line = metric + (first + number) * columns + first
        pull = pulls[number]
        for before in tl.static_range(number):
            pull += tl.load(line + before) * ((news[before] - olds[before]) * s)
        wished = olds[number] - pull * (tl.load(inverse + first + number) * over)
        news += (_level(wished, z, cells, top, rule, count),)  # type: ignore[assignment]
    for number in tl.static_range(part):
        at = (first + number).to(tl.int64) * out + row
        tl.store(level + at, news[number], mask=inside)
        tl.store(moved + at, news[number] - olds[number], mask=inside)


@triton.jit
def _improve_kernel(
    linear, aim, metric, inverse, begun, scales_in, zeros, cells, level, product, moved, scales_out, losses,
    out, passes,
    columns: tl.constexpr, part: tl.constexpr, top: tl.constexpr, rule: tl.constexpr, kind: tl.constexpr,
    count: tl.constexpr, current: tl.constexpr, fit: tl.constexpr, judge: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    # One program is one start of `rows` rows of a problem. Columns are taken in parts, so that what changes from step
    # to step fits into registers; what lies in `level`, `product` and `moved` this program alone touches.
    row, start = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1)
    inside, within = (row < out)[None, :], tl.arange(0, part)
    problem = tl.program_id(2)
    unit = (start * tl.num_programs(2) + problem).to(tl.int64)
    s = tl.load(scales_in + unit * out + row, mask=row < out, other=1.0)
    z = tl.load(zeros + unit * out + row, mask=row < out, other=0.0)
    level += unit * columns * out
    product += unit * columns * out
    moved += unit * columns * out
    linear += problem.to(tl.int64) * columns * out
    aim += problem.to(tl.int64) * columns * out
    begun += problem.to(tl.int64) * columns * out
    metric += problem * columns * columns
    inverse += problem * columns
    for first in range(0, columns, part):
        at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
        if current and start == 0:
            tl.store(level + at, tl.load(begun + at, mask=inside, other=0.0), mask=inside)
        else:
            goal = tl.load(aim + at, mask=inside, other=0.0)
            ratio = tl.div_rn(goal, tl.where(s == 0, 1e-30, s)[None, :] + tl.zeros_like(goal))
            tl.store(level + at, _level(ratio, z[None, :], cells, top, rule, count), mask=inside)
    tl.debug_barrier()
    for _ in range(passes):
        lift, curve = tl.zeros_like(s), tl.zeros_like(s)
        for first in range(0, columns, part):
            at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
            turned = _product(metric, level, first, row, out, inside, columns, part)
            tl.store(product + at, turned, mask=inside)
            own = tl.load(level + at, mask=inside, other=0.0)
            lift += tl.sum(own * tl.load(linear + at, mask=inside, other=0.0), axis=0)
            curve += tl.sum(own * turned, axis=0)
        if fit:
            lift += s * curve
            wished = s - lift / tl.maximum(curve, 1e-30)
            step = _store(wished, kind) - s
            helps = (2 * step * lift + step * step * curve < 0) & (wished * s > 0) & (curve > 0)
            s += tl.where(helps, step, 0.0)
        tl.debug_barrier()
        for first in range(0, columns, part):
            if first > 0:
                at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
                turned = tl.load(product + at, mask=inside, other=0.0)
                for done in range(0, first, part):
                    block = tl.load(metric + (first + within)[:, None] * columns + (done + within)[None, :])
                    place = (done + within).to(tl.int64)[:, None] * out + row[None, :]
                    change = tl.load(moved + place, mask=inside, other=0.0)
                    turned = tl.dot(block, change, turned, input_precision="tf32")
                tl.store(product + at, turned, mask=inside)
                tl.debug_barrier()
            _round_part(
                level, moved, product, linear, metric, inverse, first, row, out, s, z, cells,
                columns, part, top, rule, count,
            )  # fmt: skip
            tl.debug_barrier()
    if judge:  # what is lost beside the aim: no large numbers that cancel
        for first in range(0, columns, part):
            at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
            error = tl.load(level + at, mask=inside, other=0.0) * s[None, :]
            tl.store(moved + at, error - tl.load(aim + at, mask=inside, other=0.0), mask=inside)
        tl.debug_barrier()
        loss = tl.zeros_like(s)
        for first in range(0, columns, part):
            at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
            slope = _product(metric, moved, first, row, out, inside, columns, part)
            loss += tl.sum(slope * tl.load(moved + at, mask=inside, other=0.0), axis=0)
        tl.store(losses + unit * out + row, loss, mask=row < out)
    tl.store(scales_out + unit * out + row, s, mask=row < out)


def rank(
    aim: Tensor, metric: Tensor, ratios: Sequence[float], table: Sequence[float], top: int, rule: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(losses beside the aim, scales, zeros) of candidates, each ``[candidates, out]``. ``aim [g, out]``. Of a stack of
    problems: ``[candidates, E, out]``, ``[E, g, out]``."""
    *problems, columns, out = aim.shape
    losses, scales, zeros = aim.new_empty(3, len(ratios), *problems, out)
    _rank_kernel[(triton.cdiv(out, RANK_ROWS), len(ratios), *(problems or [1]))](
        aim.contiguous(), metric.contiguous(), metric.new_tensor(list(ratios)), _cells(metric, table), losses, scales,
        zeros, out,
        columns, min(columns, RANK_PART), top, rule, STORED[dtype], CELLS, RANK_ROWS, num_warps=RANK_WARPS,
    )  # fmt: skip
    return losses, scales, zeros


def improve(
    linear: Tensor, aim: Tensor | None, metric: Tensor, begun: Tensor | None, scales: Tensor, zeros: Tensor,
    table: Sequence[float], top: int, rule: int, dtype: torch.dtype, fit: bool, passes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(levels ``[starts, g, out]``, scales, losses ``[starts, out]``); losses are empty where there is one start.
    ``scales``, ``zeros`` ``[starts, out]``; ``begun``: levels of the first start, those of others are the nearest to
    ``aim``. Of a stack of problems the same with an axis of them before the last two, or before the last."""
    *problems, columns, out = linear.shape
    starts = scales.shape[0]
    level, product, moved = linear.new_empty(3, starts, *linear.shape)
    found, losses = scales.new_empty(2, *scales.shape)
    _improve_kernel[(triton.cdiv(out, ROWS), starts, *(problems or [1]))](
        linear.contiguous(), (linear if aim is None else aim).contiguous(), metric.contiguous(),
        1 / metric.diagonal(dim1=-2, dim2=-1), level if begun is None else begun.contiguous(),
        scales.contiguous(), zeros.contiguous(), _cells(metric, table), level, product, moved, found, losses, out,
        passes,
        columns, min(columns, PART), top, rule, STORED[dtype], CELLS, begun is not None, fit, starts > 1, ROWS,
        num_warps=1,
    )  # fmt: skip
    return level, found, losses


def _cells(like: Tensor, table: Sequence[float]) -> Tensor:
    """For each of CELLS equal steps from -1 to 1: the middle between two levels that lies in it, the level below it,
    the level above; ``[3, CELLS]``."""
    if not table:
        return like.new_zeros(1)
    middles = [(low + high) / 2 for low, high in pairwise(table)]
    rows: list[tuple[float, float, float]] = []
    for cell in range(CELLS):
        low, high = cell * 2 / CELLS - 1, (cell + 1) * 2 / CELLS - 1
        here = [number for number, middle in enumerate(middles) if low <= middle < high]
        below = sum(middle < low for middle in middles)
        if len(here) > 1:
            raise ValueError("levels lie too close together")
        rows.append(
            (middles[here[0]], table[here[0]], table[here[0] + 1]) if here else (2.0, table[below], table[below])
        )
    return like.new_tensor(list(zip(*rows, strict=True)))


def fits(columns: int) -> bool:
    """Whether the kernels take groups of so many columns."""
    return 16 <= columns <= 128 and columns & (columns - 1) == 0
