"""The Triton twin of kquant_visits: a whole visit to a super-block in one launch.

A program has `ROWS` rows of one problem, a thread a row, and goes through the sub-blocks in turn. Products with a
metric are tiles ``[columns, rows]``, the descent from code to code is the thread's own; what one hands to the other
lies in `work`, which this program alone touches.
"""

from __future__ import annotations

# Kernels carry no annotations: Triton would compile them (pyproject.toml tells mypy).
import triton
import triton.language as tl
from torch import Tensor

from qtool.quantize.descent_kernels import on_device
from qtool.quantize.methods.kquant_columns import BlockColumns

ROWS = 32
SECTIONS = 10  # of `work`, `size` columns each: three starts' codes and half gradients; metric @ codes; the best
# codes; half a gradient, then the moves; codes


@triton.jit
def _round(x, low, high):
    """The nearest integer within bounds that are integers; halves go to the even one, as in torch.round."""
    return (tl.minimum(tl.maximum(x, low), high) + 12582912.0) - 12582912.0


@triton.jit
def _stored(wished, unit, nudge, least: tl.constexpr, most: tl.constexpr, stepped: tl.constexpr):
    """kquant_columns.Stored: the multiple of ``unit`` that is nearest, ``nudge`` further; or a float16."""
    if stepped:
        over = tl.where(unit == 0, 0.0, 1.0 / tl.where(unit == 0, 1.0, unit))
        count = _round(wished * over, least - 2, most + 2) + nudge
        value = tl.minimum(tl.maximum(count, least), most) * unit
    else:
        value = tl.minimum(tl.maximum(wished, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
    return value


@triton.jit
def _product(metric, tile, size: tl.constexpr):
    """``metric @ tile`` of ``[size, size]`` and ``[size, rows]``."""
    within = tl.arange(0, size)
    return tl.dot(tl.load(metric + within[:, None] * size + within[None, :]), tile, input_precision="tf32x3")


@triton.jit
def _nearest(aim, s, z, low: tl.constexpr, top: tl.constexpr):
    """Codes of a tile by plain rounding."""
    over = tl.where(s == 0, 1e-30, s)[None, :] + tl.zeros_like(aim)
    return _round(tl.div_rn(aim + z[None, :], over), low, low + top)


@triton.jit
def _covering(least_value, greatest, ratio, unit, shift_unit, low: tl.constexpr, top: tl.constexpr, least: tl.constexpr,
              most: tl.constexpr, stepped: tl.constexpr, affine: tl.constexpr):  # fmt: skip
    """Scale and shift of ``ratio`` times a range."""
    if affine:
        bottom = tl.minimum(least_value, 0.0)
        s = _stored((tl.maximum(greatest, 0.0) - bottom) * ratio / top, unit, 0.0, least, most, stepped)
        z = _stored(bottom * -ratio, shift_unit, 0.0, least, most, stepped)
    else:
        widest = tl.where(-least_value > greatest, -least_value, -greatest)
        s = _stored(widest * ratio / -low, unit, 0.0, least, most, stepped)
        z = tl.zeros_like(s)
    return s, z


@triton.jit
def _finalists(aim, metric, work, at, inside, ratios, tried, unit, shift_unit, out, size: tl.constexpr,
               low: tl.constexpr, top: tl.constexpr, least: tl.constexpr, most: tl.constexpr, stepped: tl.constexpr,
               affine: tl.constexpr):  # fmt: skip
    """kquant_visits._ranges of a tile: two scales and shifts; their codes and half gradients go into the second and
    third start of `work`."""
    lowest, highest = tl.min(aim, axis=0), tl.max(aim, axis=0)
    s1, z1, first = tl.zeros_like(unit), tl.zeros_like(unit), tl.zeros_like(unit) + float("inf")
    s2, z2, second = s1, z1, first
    for number in range(tried):
        ratio = tl.load(ratios + number)
        s, z = _covering(lowest, highest, ratio, unit, shift_unit, low, top, least, most, stepped, affine)
        error = _nearest(aim, s, z, low, top) * s[None, :] - z[None, :] - aim
        loss = tl.sum(_product(metric, error, size) * error, axis=0)
        leads, follows = loss < first, loss < second
        second = tl.where(leads, first, tl.where(follows, loss, second))
        s2, z2 = tl.where(leads, s1, tl.where(follows, s, s2)), tl.where(leads, z1, tl.where(follows, z, z2))
        first, s1, z1 = tl.where(leads, loss, first), tl.where(leads, s, s1), tl.where(leads, z, z1)
    codes = _nearest(aim, s1, z1, low, top)
    tl.store(work + size * out + at, codes, mask=inside)
    tl.store(work + 4 * size * out + at, _product(metric, codes * s1[None, :] - z1[None, :] - aim, size), mask=inside)
    codes = _nearest(aim, s2, z2, low, top)
    tl.store(work + 2 * size * out + at, codes, mask=inside)
    tl.store(work + 5 * size * out + at, _product(metric, codes * s2[None, :] - z2[None, :] - aim, size), mask=inside)
    return s1, z1, s2, z2


@triton.jit
def _least_squares(state, metric, sums, work, at, inside, s, z, out, size: tl.constexpr, affine: tl.constexpr,
                   first: tl.constexpr):  # fmt: skip
    """kquant_visits._least_squares of the codes in `work`, before it is stored: the scale, and ``cross``, ``level`` and
    ``ones``, of which the shift follows. `work` gets the half gradient and ``metric @ codes``."""
    codes, half = tl.load(work + at, mask=inside, other=0.0), tl.load(state + at, mask=inside, other=0.0)
    product = _product(metric, codes, size)
    if first:
        half = _product(metric, codes * s[None, :] - z[None, :] - half, size)
    tl.store(work + 3 * size * out + at, half, mask=inside)
    tl.store(work + 6 * size * out + at, product, mask=inside)
    curve, lean = tl.sum(codes * product, axis=0), tl.sum(codes * half, axis=0)
    cross, level = tl.sum(product, axis=0), tl.sum(half, axis=0)
    ones = tl.maximum(tl.sum(tl.load(sums + tl.arange(0, size)), axis=0), 1e-30)
    if affine:
        rest = curve - cross * cross / ones
        step = (cross * level / ones - lean) / tl.maximum(rest, 1e-30)
        wished = s + tl.where(rest > 1e-6 * curve, step, 0.0)
    else:
        wished = s - lean / tl.maximum(curve, 1e-30)
    return wished, cross, level, ones


@triton.jit
def _gradient(state, work, slot, sums, at, inside, s, z, ds, dz, out, size: tl.constexpr, first: tl.constexpr):
    """Half the gradient of a start, whose scale and shift are ``ds`` and ``dz`` more than those of the half gradient in
    `work`, goes there; and what the start loses."""
    begun = work + slot * size * out + at
    old, goal = tl.load(begun, mask=inside, other=0.0), tl.load(state + at, mask=inside, other=0.0)
    lift = ds[None, :] * tl.load(work + 6 * size * out + at, mask=inside, other=0.0)
    lift -= dz[None, :] * tl.load(sums + tl.arange(0, size))[:, None]
    pull = tl.load(begun + 3 * size * out, mask=inside, other=0.0) + lift
    tl.store(work + 8 * size * out + at, pull, mask=inside)
    if first:
        loss = tl.sum((old * s[None, :] - z[None, :] - goal) * pull, axis=0)
    else:
        loss = tl.sum((ds[None, :] * old - dz[None, :]) * (pull + goal), axis=0)
    return loss


@triton.jit
def _descend(begun, pulled, news, metric, inverse, row, mask, out, s, size: tl.constexpr, low: tl.constexpr,
             top: tl.constexpr):  # fmt: skip
    """Each column of the codes ``begun`` in turn gets its best level, by ``pulled``, half the gradient, whose place the
    moves of weights take; returns by how much less is lost. Of 16 columns all is loaded before
    the first step."""
    over, within, inside = 1.0 / tl.where(s == 0, 1e-30, s), tl.arange(0, 16), mask[None, :]
    gain = tl.zeros_like(s)
    for begin in range(0, size, 16):
        if begin > 0:
            place = pulled + (begin + within)[:, None] * out + row[None, :]
            total = tl.load(place, mask=inside, other=0.0)
            for done in range(0, begin, 16):
                block = tl.load(metric + (begin + within)[:, None] * size + (done + within)[None, :])
                moved = tl.load(pulled + (done + within)[:, None] * out + row[None, :], mask=inside, other=0.0)
                total = tl.dot(block, moved, total, input_precision="tf32x3")
            tl.store(place, total, mask=inside)
            tl.debug_barrier()
        lines, at = metric + begin * size + begin, begin * out + row
        olds = ()
        pulls = ()
        for i in tl.static_range(16):
            pull = tl.load(pulled + at + i * out, mask=mask, other=0.0)
            olds += (tl.load(begun + at + i * out, mask=mask, other=0.0),)
            pulls += (pull,)
        moves = ()
        for i in tl.static_range(16):
            pull = pulls[i]
            for before in tl.static_range(i):
                pull += tl.load(lines + i * size + before) * moves[before]
            new = _round(olds[i] - pull * (tl.load(inverse + begin + i) * over), low, low + top)
            move = (new - olds[i]) * s
            gain -= move * (2 * pull + move * tl.load(lines + i * size + i))
            moves += (move,)
            tl.store(news + at + i * out, new, mask=mask)
        for i in tl.static_range(16):
            tl.store(pulled + at + i * out, moves[i], mask=mask)
        tl.debug_barrier()
    return gain


@triton.jit
def _spread_change(state, spread, change, begin, width, row, out, size: tl.constexpr):
    """``state += spreadᵀ @ change`` from column ``begin`` on."""
    within, inside = tl.arange(0, size), (row < out)[None, :]
    for column in range(begin, width, size):
        lines = tl.load(spread + within[None, :] * width + (column + within)[:, None])
        place = (column + within)[:, None] * out + row[None, :]
        total = tl.load(state + place, mask=inside, other=0.0)
        tl.store(state + place, tl.dot(lines, change, total, input_precision="tf32x3"), mask=inside)


# Long, because it is one launch: every sub-block needs what the one before it changed. What stands alone is a function
# above; a loop's body taken out would hand over twenty names.
@triton.jit
def _settle_kernel(
    codes, scale, shift, d, dmin, state, own, sums, inverse, spread, work, ratios, tried,
    out, subs, between_codes, between_scales, between_units,
    size: tl.constexpr, low: tl.constexpr, top: tl.constexpr, least: tl.constexpr, most: tl.constexpr,
    stepped: tl.constexpr, affine: tl.constexpr, first: tl.constexpr, rounds: tl.constexpr, sections: tl.constexpr,
    rows: tl.constexpr,
):  # fmt: skip
    row, problem, problems = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1), tl.num_programs(1)
    mask, at = row < out, tl.arange(0, size)[:, None] * out + row[None, :]
    inside, width = mask[None, :], subs * size
    codes, state = codes + problem.to(tl.int64) * between_codes, state + problem.to(tl.int64) * width * out
    scale, shift = scale + problem.to(tl.int64) * between_scales, shift + problem.to(tl.int64) * between_scales
    work += problem.to(tl.int64) * sections * size * out
    unit = tl.load(d + problem.to(tl.int64) * between_units + row, mask=mask, other=1.0)
    shift_unit = tl.load(dmin + problem.to(tl.int64) * between_units + row, mask=mask, other=1.0)
    known: tl.constexpr = 4 if stepped else 2  # starts from the codes that are there
    for sub in range(subs):
        number, place = sub * problems + problem, sub * size * out
        metric, line, over = own + number * size * size, sums + number * size, inverse + number * size
        s = tl.load(scale + sub * out + row, mask=mask, other=0.0)
        z = tl.load(shift + sub * out + row, mask=mask, other=0.0)
        tile = tl.load(codes + place + at, mask=inside, other=0.0)
        goal = tl.load(state + place + at, mask=inside, other=0.0)
        tl.store(work + at, tile, mask=inside)
        s1, z1, s2, z2 = s, z, s, z
        if first:
            s1, z1, s2, z2 = _finalists(
                goal, metric, work, at, inside, ratios, tried, unit, shift_unit, out, size, low, top, least, most,
                stepped, affine,
            )  # fmt: skip
        tl.debug_barrier()
        for done in range(rounds):
            wished, cross, level, ones = _least_squares(
                state + place, metric, line, work, at, inside, s, z, out, size, affine, first
            )
            tl.debug_barrier()
            best, best_s, best_z = tl.zeros_like(s), s, z
            starts = known
            if first:
                starts = known + 2 * tl.maximum(1 - done, 0)
            for start in range(starts):
                own_s = _stored(wished, unit, start - 2.0 if stepped else 0.0, least, most, stepped)
                own_z = tl.zeros_like(z)
                if affine:
                    own_z = _stored(z + (level + (own_s - s) * cross) / ones, shift_unit, 0.0, least, most, stepped)
                new_s, new_z = tl.where(start == 0, s, own_s), tl.where(start == 0, z, own_z)
                slot = 0
                if first:
                    slot = tl.maximum(start - known + 1, 0)
                    new_s = tl.where(slot == 1, s1, tl.where(slot == 2, s2, new_s))
                    new_z = tl.where(slot == 1, z1, tl.where(slot == 2, z2, new_z))
                ds, dz = tl.where(slot == 0, new_s - s, 0.0), tl.where(slot == 0, new_z - z, 0.0)
                loss = _gradient(state + place, work, slot, line, at, inside, new_s, new_z, ds, dz, out, size, first)
                tl.debug_barrier()
                loss -= _descend(
                    work + slot * size * out, work + 8 * size * out, work + 9 * size * out, metric, over, row, mask,
                    out, new_s, size, low, top,
                )  # fmt: skip
                better = (loss < best) | (start == 0)
                found = tl.load(work + 9 * size * out + at, mask=inside, other=0.0)
                tl.store(work + 7 * size * out + at, found, mask=inside & better[None, :])
                best = tl.where(better, loss, best)
                best_s, best_z = tl.where(better, new_s, best_s), tl.where(better, new_z, best_z)
                tl.debug_barrier()
            s, z = best_s, best_z
            tl.store(work + at, tl.load(work + 7 * size * out + at, mask=inside, other=0.0), mask=inside)
            tl.debug_barrier()
        here = tl.load(state + place + at, mask=inside, other=0.0)  # the weights wanted
        if not first:
            here = tl.load(codes + place + at, mask=inside, other=0.0)
            here *= tl.load(scale + sub * out + row, mask=mask, other=0.0)[None, :]
            here -= tl.load(shift + sub * out + row, mask=mask, other=0.0)[None, :]
        tile = tl.load(work + at, mask=inside, other=0.0)
        tl.debug_barrier()
        tl.store(codes + place + at, tile, mask=inside)
        tl.store(scale + sub * out + row, s, mask=mask)
        tl.store(shift + sub * out + row, z, mask=mask)
        change = tile * s[None, :] - z[None, :] - here
        begin = (sub + 1) * size if first else 0
        _spread_change(state, spread + number * size * width, change, begin, width, row, out, size)
        tl.debug_barrier()


def settle(
    part: BlockColumns, state: Tensor, own: Tensor, spread: Tensor, ratios: tuple[float, ...], rounds: int
) -> None:
    """`kquant_visits._settle`, where ``ratios`` are those of the first pass, none later; ``rounds``: at a sub-block."""
    kind, out, problems = part.kind, state.shape[-1], state.shape[:-2]
    count = len(state) if problems else 1
    own, spread = own.contiguous(), spread.contiguous()
    gaps = [one.stride(0) if problems else 0 for one in (part.codes, part.scale, part.d)]
    least, most = kind.steps or (0, 0)
    _settle_kernel[(triton.cdiv(out, ROWS), count)](
        *part.numbers, state, own, own.sum(-1), (1 / own.diagonal(dim1=-2, dim2=-1)).contiguous(), spread,
        state.new_empty(count * SECTIONS * kind.size * out), on_device(ratios or (1.0,), state.device), len(ratios),
        out, len(own), *gaps,
        kind.size, kind.low, kind.top, least, most, kind.steps is not None, kind.affine, bool(ratios), rounds,
        SECTIONS, ROWS, num_warps=1,
    )  # fmt: skip
