"""The Triton twin of quantize.descent.choose: one launch finds scale and codes of a group for every row."""

from __future__ import annotations

# Kernels carry no annotations: Triton would compile them (pyproject.toml tells mypy).
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

SIGNED, MIRRORED, RANGE, TABLE = range(4)  # how a scale is made of a range
FLOAT32, FLOAT16, BFLOAT16 = range(3)  # what a scale is stored as
STORED = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
ROWS, PART, WARPS = 16, 32, 1  # of a program; PART: columns that a step touches
SLOTS = 16  # for the losses of as many candidates at most


@triton.jit
def _nearest(x):
    """Round half to even, as torch.round: adding and taking away 1.5 * 2**23 leaves an integer for |x| < 2**22."""
    magic = 12582912.0
    return tl.where(tl.abs(x) < 4194304.0, (x + magic) - magic, x)


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
def _level(weight, scale, zero, table, middles, top: tl.constexpr, rule: tl.constexpr):
    """quantize.descent.nearest."""
    ratio = tl.div_rn(weight, tl.where(scale == 0, 1e-30, scale) + tl.zeros_like(weight))
    if rule == 3:
        number = tl.zeros_like(ratio).to(tl.int32)
        for step in tl.static_range(15):
            number += (ratio > tl.load(middles + step)).to(tl.int32)
        level = tl.load(table + number)
    else:
        level = tl.minimum(tl.maximum(_nearest(ratio), -zero), top - zero)
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
        zero = tl.minimum(tl.maximum(_nearest(tl.div_rn(-low, scale)), 0.0), top)
    else:
        scale = widest
    return scale, zero


@triton.jit
def _loss(left, slope, error, metric, scale, here, first, row, out, inside, columns: tl.constexpr, part: tl.constexpr):
    """What the columns ``first`` … ``first + part`` of an error ``[columns, rows]`` add to e (2 slope + e metric)ᵀ;
    their own error is ``left * scale - here``."""
    within = first + tl.arange(0, part)
    at = within.to(tl.int64)[:, None] * out + row[None, :]
    rows_of_metric = tl.load(metric + within[:, None] * columns + tl.arange(0, columns)[None, :])
    own = left * scale[None, :] - tl.load(here + at, mask=inside, other=0.0)
    lean = tl.load(slope + at, mask=inside, other=0.0)
    return tl.sum((tl.dot(rows_of_metric, error, input_precision="tf32x3") + 2 * lean) * own, axis=0)


@triton.jit
def _choose_kernel(
    here, slope, aim, metric, level_in, scale_in, zero_in, work, level_out, scale_out, zero_out, ratios, table, middles,
    out, own, count, finalists, passes,
    columns: tl.constexpr, part: tl.constexpr, top: tl.constexpr, rule: tl.constexpr, kind: tl.constexpr,
    current: tl.constexpr, scales: tl.constexpr, slots: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    # One warp does `rows` rows. Columns are taken in parts: what changes from step to step then fits into registers,
    # and what a step sums over lies in few lanes. The levels in work lie in `work`, which this program alone touches.
    # Of `own` rows each problem has, the second axis of programs says which: its metric lies that far behind.
    local = tl.program_id(0) * rows + tl.arange(0, rows)
    row = tl.program_id(1) * own + local
    alive = local < own
    metric += tl.program_id(1) * columns * columns
    column, within = tl.arange(0, columns), tl.arange(0, part)
    slot = tl.arange(0, slots)[:, None]
    inside = alive[None, :]
    place = column.to(tl.int64)[:, None] * out + row[None, :]
    goal = tl.load(aim + place, mask=inside, other=0.0)
    low, high = tl.min(goal, axis=0), tl.max(goal, axis=0)
    losses = tl.zeros([slots, rows], tl.float32) + float("inf")
    for number in range(count):
        s, z = _covering(low, high, tl.load(ratios + number), top, rule, kind)
        error = _level(goal, s[None, :], z[None, :], table, middles, top, rule) * s[None, :]
        error -= tl.load(here + place, mask=inside, other=0.0)
        loss = tl.zeros_like(low)
        for first in range(0, columns, part):
            at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
            wished = tl.load(aim + at, mask=inside, other=0.0)
            level = _level(wished, s[None, :], z[None, :], table, middles, top, rule)
            loss += _loss(level, slope, error, metric, s, here, first, row, out, inside, columns, part)
        losses = tl.where(slot == number, loss[None, :], losses)
    best = tl.zeros_like(low) + float("inf")
    for start in range(-1 if current else 0, finalists):
        if start < 0:
            s = tl.load(scale_in + row, mask=alive, other=1.0)
            z = tl.load(zero_in + row, mask=alive, other=0.0)
            tl.store(work + place, tl.load(level_in + place, mask=inside, other=0.0), mask=inside)
        else:
            leader = tl.argmin(losses, axis=0)
            losses = tl.where(slot == leader[None, :], float("inf"), losses)
            s, z = _covering(low, high, tl.load(ratios + leader), top, rule, kind)
            wished = tl.load(aim + place, mask=inside, other=0.0)
            tl.store(work + place, _level(wished, s[None, :], z[None, :], table, middles, top, rule), mask=inside)
        tl.debug_barrier()
        for _ in range(passes):
            if scales:
                every = tl.load(work + place, mask=inside, other=0.0)
                error = every * s[None, :] - tl.load(here + place, mask=inside, other=0.0)
                lift, curve = tl.zeros_like(low), tl.zeros_like(low)
                for first in range(0, columns, part):
                    at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
                    m = tl.load(metric + (first + within)[:, None] * columns + column[None, :])
                    level = tl.load(work + at, mask=inside, other=0.0)
                    gradient = tl.load(slope + at, mask=inside, other=0.0)
                    gradient += tl.dot(m, error, input_precision="tf32x3")
                    lift += tl.sum(level * gradient, axis=0)
                    curve += tl.sum(level * tl.dot(m, every, input_precision="tf32x3"), axis=0)
                wished = s - lift / tl.maximum(curve, 1e-30)
                step = _store(wished, kind) - s
                helps = (2 * step * lift + step * step * curve < 0) & (wished * s > 0) & (curve > 0)
                s += tl.where(helps, step, 0.0)
            for first in range(0, columns, part):
                at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
                m = tl.load(metric + (first + within)[:, None] * columns + column[None, :])
                error = tl.load(work + place, mask=inside, other=0.0) * s[None, :]
                error -= tl.load(here + place, mask=inside, other=0.0)
                gradient = tl.load(slope + at, mask=inside, other=0.0)
                gradient += tl.dot(m, error, input_precision="tf32x3")
                level = tl.load(work + at, mask=inside, other=0.0)
                for number in range(part):
                    chosen = within[:, None] == number
                    pull = tl.sum(tl.where(chosen, gradient, 0.0), axis=0)
                    old = tl.sum(tl.where(chosen, level, 0.0), axis=0)
                    line = metric + (first + number) * columns + first
                    new = _level(old * s - pull / tl.load(line + number), s, z, table, middles, top, rule)
                    level = tl.where(chosen, new[None, :], level)
                    gradient += tl.load(line + within)[:, None] * ((new - old) * s)[None, :]
                tl.debug_barrier()
                tl.store(work + at, level, mask=inside)
                tl.debug_barrier()
        error = tl.load(work + place, mask=inside, other=0.0) * s[None, :]
        error -= tl.load(here + place, mask=inside, other=0.0)
        loss = tl.zeros_like(low)
        for first in range(0, columns, part):
            at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
            level = tl.load(work + at, mask=inside, other=0.0)
            loss += _loss(level, slope, error, metric, s, here, first, row, out, inside, columns, part)
        better = loss < best
        best = tl.where(better, loss, best)
        tl.store(scale_out + row, s, mask=alive & better)
        tl.store(zero_out + row, z, mask=alive & better)
        tl.store(level_out + place, tl.load(work + place, mask=inside, other=0.0), mask=inside & better[None, :])
        tl.debug_barrier()


def choose(
    problem: Sequence[Tensor], ratios: Sequence[float], current: Sequence[Tensor] | None, table: Sequence[float],
    top: int, rule: int, dtype: torch.dtype, scales: bool, finalists: int, passes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Levels ``[out, g]``, scale and zero ``[out, 1]``: as quantize.descent.choose. ``problem``: here, slope, aim
    ``[out, g]`` and metric ``[g, g]``; ``current``: levels, scale, zero; ``rule``: SIGNED … TABLE; ``dtype``: of scales
    as they are stored. Or a stack ``[E, …]`` of all, in one launch."""
    if problem[0].ndim == 2:
        stack = None if current is None else [part.unsqueeze(0) for part in current]
        one = [part.unsqueeze(0) for part in problem]
        level, scale, zero = choose(one, ratios, stack, table, top, rule, dtype, scales, finalists, passes)
        return level[0], scale[0], zero[0]
    *sides, metric = problem
    problems, own, columns = sides[0].shape
    out = problems * own
    if not fits(columns) or len(ratios) > SLOTS:
        raise ValueError(f"groups of {columns} columns, {len(ratios)} candidates")
    level, scale, zero = metric.new_empty(columns, out), *metric.new_empty(2, out, 1)
    places = metric.new_tensor(list(table) or [0.0, 0.0])
    middles = (places[1:] + places[:-1]) / 2
    begun = (level, scale, zero) if current is None else (current[0].flatten(0, 1).t(), current[1], current[2])
    _choose_kernel[(triton.cdiv(own, ROWS), problems)](
        *(side.flatten(0, 1).t().contiguous() for side in sides), metric.contiguous(),
        *(tensor.contiguous() for tensor in begun),
        torch.empty_like(level), level, scale, zero, metric.new_tensor(list(ratios) or [1.0]), places, middles,
        out, own, len(ratios), min(finalists, len(ratios)), passes,
        columns, min(columns, PART), top, rule, STORED[dtype], current is not None, scales, SLOTS, ROWS,
        num_warps=WARPS,
    )  # fmt: skip
    return level.t().unflatten(0, (problems, own)), scale.view(problems, own, 1), zero.view(problems, own, 1)


def fits(columns: int) -> bool:
    """Whether the kernel takes groups of so many columns."""
    return 16 <= columns <= 128 and columns & (columns - 1) == 0
