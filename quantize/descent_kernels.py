"""The Triton twins of quantize.descent's two inner steps: ranking candidates, improving what is there."""

from __future__ import annotations

from functools import cache

# Kernels carry no annotations: Triton would compile them (pyproject.toml tells mypy).
import torch
import triton
import triton.language as tl
from torch import Tensor

STORED = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # what a scale is stored as
ROWS, PART = 32, 16  # of a program, one thread a row; columns that are taken in turn before others hear of them
RANK_ROWS, RANK_PART, RANK_WARPS = 32, 32, 4


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
def _level(ratio, zero, table: tl.constexpr, top: tl.constexpr, rule: tl.constexpr):
    """The level nearest to weight / scale. Adding and taking away 1.5 * 2**23 rounds half to even, as torch.round."""
    if rule == 3:  # between neighbours, then between the winners of neighbouring pairs, and so on
        pairs = _winners(ratio, table, table, 1)
        level = _winners(ratio, table, _winners(ratio, table, _winners(ratio, table, pairs, 2), 4), 8)[0]
    else:
        level = (tl.minimum(tl.maximum(ratio, -zero), top - zero) + 12582912.0) - 12582912.0
    return level


@triton.jit
def _winners(ratio, table: tl.constexpr, found, width: tl.constexpr):
    """``found``: the nearest among each ``width`` neighbours of the table; of two, the middle between them decides."""
    winners = ()
    for number in tl.static_range(16 // width // 2):
        middle = (table[2 * width * number + width - 1] + table[2 * width * number + width]) / 2
        winner = tl.where(ratio > middle, found[2 * number + 1], found[2 * number])
        winners += (winner,)  # type: ignore[assignment]  # a tuple of any length
    return winners


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
def _dot(left, right, total, top: tl.constexpr):
    """``total + left @ right``; TF32 is enough where a step is a sixteenth of the range."""
    if top > 15:
        total = tl.dot(left, right, total, input_precision="tf32x3")
    else:
        total = tl.dot(left, right, total, input_precision="tf32")
    return total


@triton.jit
def _product(metric, tile, first, row, out, inside, columns: tl.constexpr, part: tl.constexpr, top: tl.constexpr):
    """``metric[first : first + part] @ tile`` for the rows of a program, ``[part, rows]``; tile ``[columns, out]``."""
    within = tl.arange(0, part)
    total = tl.zeros([part, row.shape[0]], tl.float32)
    for start in range(0, columns, part):
        block = tl.load(metric + (first + within)[:, None] * columns + (start + within)[None, :])
        at = (start + within).to(tl.int64)[:, None] * out + row[None, :]
        total = _dot(block, tl.load(tile + at, mask=inside, other=0.0), total, top)
    return total


@triton.jit
def _nearest(weights, s, z, table: tl.constexpr, top: tl.constexpr, rule: tl.constexpr):
    """quantize.descent.nearest of a tile ``[columns, rows]``."""
    ratio = tl.div_rn(weights, tl.where(s == 0, 1e-30, s)[None, :] + tl.zeros_like(weights))
    return _level(ratio, z[None, :], table, top, rule)


@triton.jit
def _rank_kernel(
    aim, metric, ratios, losses, scales, zeros, out,
    columns: tl.constexpr, part: tl.constexpr, table: tl.constexpr, top: tl.constexpr, rule: tl.constexpr,
    kind: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    # One program is one candidate of `rows` rows of a problem: what plain rounding to it loses.
    problem, problems = tl.program_id(2), tl.num_programs(2)
    aim += problem.to(tl.int64) * columns * out
    metric += problem * columns * columns
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    number, column, within = tl.program_id(1), tl.arange(0, columns), tl.arange(0, part)
    inside = (row < out)[None, :]
    goal = tl.load(aim + column.to(tl.int64)[:, None] * out + row[None, :], mask=inside, other=0.0)
    s, z = _covering(tl.min(goal, axis=0), tl.max(goal, axis=0), tl.load(ratios + number), top, rule, kind)
    error = _nearest(goal, s, z, table, top, rule) * s[None, :] - goal
    loss = tl.zeros_like(s)
    for first in range(0, columns, part):
        block = tl.load(metric + (first + within)[:, None] * columns + column[None, :])
        slope = _dot(block, error, tl.zeros([part, rows], tl.float32), top)
        at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
        goal_part = tl.load(aim + at, mask=inside, other=0.0)
        loss += tl.sum(slope * (_nearest(goal_part, s, z, table, top, rule) * s[None, :] - goal_part), axis=0)
    at = (number * problems + problem) * out + row
    tl.store(losses + at, loss, mask=row < out)
    tl.store(scales + at, s, mask=row < out)
    tl.store(zeros + at, z, mask=row < out)


@triton.jit
def _round_part(
    level, moved, product, linear, metric, inverse, first, row, out, s, z,
    columns: tl.constexpr, part: tl.constexpr, table: tl.constexpr, top: tl.constexpr, rule: tl.constexpr,
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
    steps = ()
    for number in tl.static_range(part):
        line = metric + (first + number) * columns + first
        pull = pulls[number]
        for before in tl.static_range(number):
            pull += tl.load(line + before) * (steps[before] * s)
        wished = olds[number] - pull * (tl.load(inverse + first + number) * over)
        steps += (_level(wished, z, table, top, rule) - olds[number],)  # type: ignore[assignment]
    for number in tl.static_range(part):
        at = (first + number).to(tl.int64) * out + row
        tl.store(level + at, olds[number] + steps[number], mask=inside)
        tl.store(moved + at, steps[number], mask=inside)


@triton.jit
def _best_scale(level, linear, product, metric, s, fit, row, out, columns: tl.constexpr, part: tl.constexpr,
                top: tl.constexpr, kind: tl.constexpr):  # fmt: skip
    """quantize.descent._best_scale where ``fit`` is 1; ``product`` gets ``metric @ level``."""
    inside, within = (row < out)[None, :], tl.arange(0, part)
    lift, curve = tl.zeros_like(s), tl.zeros_like(s)
    for first in range(0, columns, part):
        at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
        turned = _product(metric, level, first, row, out, inside, columns, part, top)
        tl.store(product + at, turned, mask=inside)
        own = tl.load(level + at, mask=inside, other=0.0)
        lift += tl.sum(own * tl.load(linear + at, mask=inside, other=0.0), axis=0)
        curve += tl.sum(own * turned, axis=0)
    lift += s * curve
    wished = s - lift / tl.maximum(curve, 1e-30)
    step = _store(wished, kind) - s
    helps = (2 * step * lift + step * step * curve < 0) & (wished * s > 0) & (curve > 0) & (fit != 0)
    return s + tl.where(helps, step, 0.0)


@triton.jit
def _leader(ranks, row, out, between, count, least, place):
    """(loss, number) of the first candidate behind the one at ``place`` that lost ``least``; they lie ``between``
    apart."""
    best, leader = row * 0.0 + float("inf"), row * 0
    for number in range(count):
        loss = tl.load(ranks + number * between + row, mask=row < out, other=0.0)
        behind = (loss > least) | ((loss == least) & (number > place))
        better = behind & (loss < best)
        best, leader = tl.where(better, loss, best), tl.where(better, number, leader)
    return best, leader


@triton.jit
def _improve_kernel(
    linear, aim, metric, inverse, ranks, scales_in, zeros_in, level, product, moved, scales_out, zeros_out, losses,
    out, count, fit,
    columns: tl.constexpr, part: tl.constexpr, table: tl.constexpr, top: tl.constexpr, rule: tl.constexpr,
    kind: tl.constexpr, current: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    # One program is one start of `rows` rows of a problem. Columns are taken in parts, so that what changes from step
    # to step fits into registers; what lies in `level`, `product` and `moved` this program alone touches.
    row, start = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1)
    problem, between = tl.program_id(2), tl.num_programs(2) * out
    linear, aim = linear + problem.to(tl.int64) * columns * out, aim + problem.to(tl.int64) * columns * out
    metric, inverse = metric + problem * columns * columns, inverse + problem * columns
    ranks, scales_in, zeros_in = ranks + problem * out, scales_in + problem * out, zeros_in + problem * out
    unit = (start * tl.num_programs(2) + problem).to(tl.int64)
    inside, within = (row < out)[None, :], tl.arange(0, part)
    seat = row
    if not current:  # the best candidate by plain rounding, or the next, and so on
        least, number = row * 0.0 - float("inf"), row * 0 - 1
        for _ in range(start + 1):
            least, number = _leader(ranks, row, out, between, count, least, number)
        seat = number * between + row
    s = tl.load(scales_in + seat, mask=row < out, other=1.0)
    z = tl.load(zeros_in + seat, mask=row < out, other=0.0)
    level, product, moved = level + unit * columns * out, product + unit * columns * out, moved + unit * columns * out
    if not current:
        for first in range(0, columns, part):
            at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
            goal = tl.load(aim + at, mask=inside, other=0.0)
            tl.store(level + at, _nearest(goal, s, z, table, top, rule), mask=inside)
        tl.debug_barrier()
    s = _best_scale(level, linear, product, metric, s, fit, row, out, columns, part, top, kind)
    tl.debug_barrier()
    for first in range(0, columns, part):
        if first > 0:
            at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
            turned = tl.load(product + at, mask=inside, other=0.0)
            for done in range(0, first, part):
                block = tl.load(metric + (first + within)[:, None] * columns + (done + within)[None, :])
                place = (done + within).to(tl.int64)[:, None] * out + row[None, :]
                turned = _dot(block, tl.load(moved + place, mask=inside, other=0.0), turned, top)
            tl.store(product + at, turned, mask=inside)
            tl.debug_barrier()
        _round_part(
            level, moved, product, linear, metric, inverse, first, row, out, s, z, columns, part, table, top, rule
        )
        tl.debug_barrier()
    tl.store(scales_out + unit * out + row, s, mask=row < out)
    tl.store(zeros_out + unit * out + row, z, mask=row < out)
    if not current:  # what is lost beside the aim: no large numbers that cancel
        for first in range(0, columns, part):
            at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
            error = tl.load(level + at, mask=inside, other=0.0) * s[None, :]
            tl.store(moved + at, error - tl.load(aim + at, mask=inside, other=0.0), mask=inside)
        tl.debug_barrier()
        loss = tl.zeros_like(s)
        for first in range(0, columns, part):
            at = (first + within).to(tl.int64)[:, None] * out + row[None, :]
            slope = _product(metric, moved, first, row, out, inside, columns, part, top)
            loss += tl.sum(slope * tl.load(moved + at, mask=inside, other=0.0), axis=0)
        tl.store(losses + unit * out + row, loss, mask=row < out)


def rank(
    aim: Tensor, metric: Tensor, ratios: tuple[float, ...], table: tuple[float, ...], top: int, rule: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(losses, scales, zeros) of candidates, each ``[candidates, out]``. ``aim [g, out]``. Of a stack of problems
    ``[candidates, E, out]`` and ``[E, g, out]``."""
    *problems, columns, out = aim.shape
    losses, scales, zeros = aim.new_empty(3, len(ratios), *problems, out)
    _rank_kernel[(triton.cdiv(out, RANK_ROWS), len(ratios), *(problems or [1]))](
        aim, metric, on_device(ratios, aim.device), losses, scales, zeros, out,
        columns, min(columns, RANK_PART), table, top, rule, STORED[dtype], RANK_ROWS, num_warps=RANK_WARPS,
    )  # fmt: skip
    return losses, scales, zeros


def improve(
    linear: Tensor, metric: Tensor, begun: Tensor, scales: Tensor, zeros: Tensor, ranks: Tensor | None,
    table: tuple[float, ...], top: int, rule: int, dtype: torch.dtype, fit: bool, starts: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(levels ``[starts, g, out]``, scales, zeros, losses ``[starts, out]``). With ``ranks``, the losses of candidates,
    those that lost least are the starts, from the levels nearest to ``begun``, the aim. Without, ``begun`` are the
    levels of the one start, and losses are not filled. A stack of problems has an axis of them behind the starts."""
    *problems, columns, out = linear.shape
    level, product, moved = linear.new_empty(3, starts, *linear.shape)
    if ranks is None:
        level[0] = begun
    found, shifts, losses = scales.new_empty(3, starts, *problems, out)
    _improve_kernel[(triton.cdiv(out, ROWS), starts, *(problems or [1]))](
        linear, begun.contiguous(), metric, (1 / metric.diagonal(dim1=-2, dim2=-1)).contiguous(),
        scales.contiguous() if ranks is None else ranks, scales.contiguous(), zeros.contiguous(),
        level, product, moved, found, shifts, losses, out, 0 if ranks is None else len(ranks), int(fit),
        columns, min(columns, PART), table, top, rule, STORED[dtype], ranks is None, ROWS, num_warps=1,
    )  # fmt: skip
    return level, found, shifts, losses


@cache
def on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Float32. Copied once: the host waits for a copy until all work before it is done."""
    return torch.tensor(values, device=device)


def fits(columns: int) -> bool:
    """Whether the kernels take groups of so many columns."""
    return 16 <= columns <= 128 and columns & (columns - 1) == 0
