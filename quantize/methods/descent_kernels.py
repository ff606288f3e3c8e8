"""The Triton twin of quantize.descent.choose: one launch finds scale and codes of a group for every row."""

from __future__ import annotations

# Kernels carry no annotations: Triton would compile them (pyproject.toml tells mypy).
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from qtool.quantize.descent import Group, Levels, Problem

SIGNED, MIRRORED, RANGE, TABLE = range(4)  # how a scale is made of a range
FLOAT32, FLOAT16, BFLOAT16 = range(3)  # what a scale is stored as
STORED = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
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
    ratio = tl.div_rn(weight, scale + tl.zeros_like(weight))
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
def _choose_kernel(
    here, slope, aim, metric, level_in, scale_in, zero_in, level_out, scale_out, zero_out, ratios, table, middles,
    out, count, finalists, passes,
    columns: tl.constexpr, top: tl.constexpr, rule: tl.constexpr, kind: tl.constexpr,
    current: tl.constexpr, scales: tl.constexpr, slots: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.arange(0, columns)
    slot = tl.arange(0, slots)[None, :]
    inside = row < out
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    base = tl.load(here + place, mask=inside[:, None], other=0.0)
    lean = tl.load(slope + place, mask=inside[:, None], other=0.0)
    goal = tl.load(aim + place, mask=inside[:, None], other=0.0)
    m = tl.load(metric + column[:, None] * columns + column[None, :])
    low, high = tl.min(goal, axis=1), tl.max(goal, axis=1)
    losses = tl.zeros([rows, slots], tl.float32) + float("inf")
    for number in range(count):
        s, z = _covering(low, high, tl.load(ratios + number), top, rule, kind)
        error = _level(goal, s[:, None], z[:, None], table, middles, top, rule) * s[:, None] - base
        loss = tl.sum((tl.dot(error, m, input_precision="tf32x3") + 2 * lean) * error, axis=1)
        losses = tl.where(slot == number, loss[:, None], losses)
    best = tl.zeros_like(low) + float("inf")
    best_s, best_z, best_level = tl.zeros_like(low) + 1.0, tl.zeros_like(low), tl.zeros_like(goal)
    for start in range(-1 if current else 0, finalists):
        if start < 0:
            s = tl.load(scale_in + row, mask=inside, other=1.0)
            z = tl.load(zero_in + row, mask=inside, other=0.0)
            level = tl.load(level_in + place, mask=inside[:, None], other=0.0)
        else:
            leader = tl.argmin(losses, axis=1)
            losses = tl.where(slot == leader[:, None], float("inf"), losses)
            s, z = _covering(low, high, tl.load(ratios + leader), top, rule, kind)
            level = _level(goal, s[:, None], z[:, None], table, middles, top, rule)
        gradient = lean + tl.dot(level * s[:, None] - base, m, input_precision="tf32x3")
        for _ in range(passes):
            if scales:
                product = tl.dot(level, m, input_precision="tf32x3")
                lift, curve = tl.sum(level * gradient, axis=1), tl.sum(level * product, axis=1)
                wished = s - lift / tl.maximum(curve, 1e-30)
                step = _store(wished, kind) - s
                helps = (2 * step * lift + step * step * curve < 0) & (wished * s > 0) & (curve > 0)
                step = tl.where(helps, step, 0.0)
                s += step
                gradient += step[:, None] * product
            for number in range(columns):
                at = column[None, :] == number
                pull = tl.sum(tl.where(at, gradient, 0.0), axis=1)
                old = tl.sum(tl.where(at, level, 0.0), axis=1)
                own = tl.load(metric + number * columns + number)
                new = _level(old * s - pull / own, s, z, table, middles, top, rule)
                level = tl.where(at, new[:, None], level)
                gradient += ((new - old) * s)[:, None] * tl.load(metric + number * columns + column)[None, :]
        error = level * s[:, None] - base
        loss = tl.sum((tl.dot(error, m, input_precision="tf32x3") + 2 * lean) * error, axis=1)
        better = loss < best
        best = tl.where(better, loss, best)
        best_s, best_z = tl.where(better, s, best_s), tl.where(better, z, best_z)
        best_level = tl.where(better[:, None], level, best_level)
    tl.store(scale_out + row, best_s, mask=inside)
    tl.store(zero_out + row, best_z, mask=inside)
    tl.store(level_out + place, best_level, mask=inside[:, None])


def choose(
    problem: Problem, levels: Levels, ratios: Sequence[float], current: Group | None, scales: bool, finalists: int,
    passes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Levels ``[out, g]``, scale and zero ``[out, 1]``: as quantize.descent.choose."""
    out, columns = problem.aim.shape
    if columns < 16 or columns & (columns - 1) or len(ratios) > SLOTS:
        raise ValueError(f"groups of {columns} columns, {len(ratios)} candidates")
    rule = TABLE if levels.table is not None else RANGE if not levels.sym else SIGNED if levels.signed else MIRRORED
    kind = STORED[levels.dtype]
    level, scale, zero = torch.empty_like(problem.aim), problem.aim.new_empty(out, 1), problem.aim.new_empty(out, 1)
    table = problem.aim.new_tensor(levels.table or (0.0, 0.0))
    given = (level, scale, zero) if current is None else (current.levels, current.scale, current.zero)
    rows = 32 if columns <= 64 else 16
    _choose_kernel[(triton.cdiv(out, rows),)](
        *(tensor.contiguous() for tensor in (problem.here, problem.slope, problem.aim, problem.metric, *given)),
        level, scale, zero, problem.aim.new_tensor(list(ratios) or [1.0]), table, (table[1:] + table[:-1]) / 2,
        out, len(ratios), min(finalists, len(ratios)), passes,
        columns, levels.top, rule, kind, current is not None, scales, SLOTS, rows, num_warps=4,
    )  # fmt: skip
    return level, scale, zero
