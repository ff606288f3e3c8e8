"""Scales and codes that lose least: each group's chosen together, the groups of a matrix in turn, until no step helps.

For inputs with Gram matrix H, a matrix W̃ in place of the target W loses tr((W̃ - W) H (W̃ - W)ᵀ). With all other groups
held, the loss of one group is a quadratic in its weights alone, so a step that lowers it lowers the whole. Steps:

* scale: the best scale for given codes, in closed form (least squares), as the container will store it;
* code: each column's best level with all others held, one column after the other (cyclic coordinate descent).

`begin` goes through the groups once, left to right, as GPTQ does: the columns behind take up what a group loses, and
the group is chosen under what they cannot take up. `descend` then comes back to every group with all others known.
GPTQ, arXiv 2210.17323; coordinate descent after it, as in CDQuant, arXiv 2406.17542; here with the scales.
Every function takes one problem or a stack of E with a leading axis on all tensors: experts, each with its own metric;
or pieces of one matrix's rows, which have a leading axis where the metric has none (crew.py).
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.quantize.chosen import Chosen, Columns, Group, Levels
from qtool.quantize.grid import diagonal_blocks, stored
from qtool.quantize.precision import add_outer, add_product, each_product, subtract_product, tensor_float32
from qtool.quantize.rounding import Factor, invert_upper

RATIOS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)  # of the scale that covers the whole range
FINALISTS = 2  # of these, the best by plain rounding are worked out
SWEEPS = 3
TINY = 1e-30  # in place of a scale that was stored as zero
EDGE = 1e-5  # from the edges of a table's parts, at least; ratios within the table are exact to 1e-7
BLOCK = 128  # columns visited at once where a group is a whole row


def begin(target: Tensor, factor: Factor, levels: Levels) -> Chosen:
    """One pass from left to right: each group under the metric that the columns behind leave it, its loss spread over
    them. ``target`` float32 ``[out, in]``, unchanged; ``factor``: of the damped Gram matrix, in the columns' order."""
    weight, size = target.mT.clone(memory_format=torch.contiguous_format), levels.group_size
    inverses = invert_upper(diagonal_blocks(factor.upper, size))
    chosen = Columns.empty(weight, size)
    for number, start in enumerate(range(0, weight.shape[-2], size)):
        stop, inverse = start + size, inverses[number]
        aim = weight[..., start:stop, :].contiguous()
        metric = inverse @ inverse.mT
        group = choose(aim, metric, levels)
        chosen.put(number, slice(start, stop), group)
        if stop < weight.shape[-2]:
            spread = each_product(inverse.mT, group.weights().neg_().add_(aim))
            subtract_product(weight[..., stop:, :], factor.upper[..., start:stop, stop:].mT, spread)
    return chosen.rows()


def descend(
    target: Tensor, chosen: Chosen, gram: Tensor, levels: Levels, sweeps: int = SWEEPS, scales: bool = True
) -> Chosen:
    """Come back to each group ``sweeps`` times, all others held; never a higher loss than before. ``gram [in, in]``:
    symmetric and positive definite. ``scales`` False: scales stay, codes move."""
    size = _block(levels.group_size)
    scales = scales and size == levels.group_size
    blocks = diagonal_blocks(gram, size)
    found, wanted = Columns.of(chosen), target.mT.contiguous()
    error = chosen.weights().mT.contiguous().sub_(wanted)
    for _ in range(sweeps):
        for number, start in enumerate(range(0, wanted.shape[-2], size)):
            columns, group = slice(start, start + size), start // levels.group_size
            before, block = found.group(group, columns), blocks[number].contiguous()
            with tensor_float32():
                linear = each_product(gram[..., columns, :], error)
            add_product(linear, block, before.weights(), -1)
            after = improve(linear, block, levels, before, scales)
            found.put(group, columns, after)
            torch.sub(after.weights(), wanted[..., columns, :], out=error[..., columns, :])
    return found.rows()


def workspace(out: int, columns: int) -> int:
    """Float32 numbers that `descend` takes at most, with what it is given: two targets, levels before and after, the
    error; a block's columns in and out of the kernels, once for each of the FINALISTS."""
    return 5 * out * columns + (4 + 4 * FINALISTS) * out * BLOCK


def _block(group_size: int) -> int:
    """The columns of a visit: a group's, or the most below BLOCK that a larger group divides by."""
    return group_size if group_size <= BLOCK else max(n for n in range(1, BLOCK + 1) if group_size % n == 0)


def choose(aim: Tensor, metric: Tensor, levels: Levels) -> Group:
    """Scales, zeros and levels that lose least of ``e metric eᵀ`` for e = weights - aim ``[g, out]``: of RATIOS of the
    covering scale, the finalists by plain rounding, improved, row by row."""
    kernels, own = _kernels(aim), (levels.table or (), levels.top, levels.rule, levels.dtype)
    if kernels is None and metric.ndim < aim.ndim:
        return Group.stack([choose(one, metric, levels) for one in aim])
    linear = each_product(metric, aim).neg_()
    if kernels is not None:
        metric = _of_each(metric, aim)
        ranks, scale, zero = kernels.rank(aim, metric, RATIOS, *own)
        code, scale, zero, losses = kernels.improve(linear, metric, aim, scale, zero, ranks, *own, True, FINALISTS)
    else:
        scale, zero = _finalists(aim, metric, levels)
        grids = zip(scale.unsqueeze(-2), zero.unsqueeze(-2), strict=True)
        improved = [_improve(linear, metric, levels, Group(nearest(aim, *g, levels), *g), True) for g in grids]
        code = torch.stack([one.levels for one in improved])
        scale = torch.stack([one.scale.squeeze(-2) for one in improved])
        losses = torch.stack([_loss(metric, one.weights().sub_(aim)) for one in improved])
    best = losses.argmin(0, keepdim=True)
    chosen = code.gather(0, best.unsqueeze(-2).expand(1, *aim.shape))[0]
    return Group(chosen, scale.gather(0, best)[0].unsqueeze(-2), zero.gather(0, best)[0].unsqueeze(-2))


def improve(linear: Tensor, metric: Tensor, levels: Levels, current: Group, scales: bool = True) -> Group:
    """A better scale (if ``scales``), then each column in turn its best level, of a group whose weights w
    ``[g, out]``, a column of them in a row, lose ``wᵀ (metric w + 2 linear)``."""
    kernels = _kernels(linear)
    if kernels is None and metric.ndim < linear.ndim:
        parts = zip(linear, current.levels, current.scale, current.zero, strict=True)
        return Group.stack([improve(one, metric, levels, Group(*group), scales) for one, *group in parts])
    if kernels is None:
        return _improve(linear, metric, levels, current, scales)
    metric = _of_each(metric, linear)
    own = (levels.table or (), levels.top, levels.rule, levels.dtype)
    code, scale, _, _ = kernels.improve(linear, metric, current.levels, current.scale, current.zero, None, *own, scales)
    return Group(code[0], scale[0].unsqueeze(-2), current.zero)


def covering(aim: Tensor, levels: Levels, ratio: float) -> tuple[Tensor, Tensor]:
    """Scale and zero ``[1, out]`` of ``ratio`` times the range of ``aim [g, out]``, as they will be stored."""
    low, high = aim.amin(-2, keepdim=True), aim.amax(-2, keepdim=True)
    if levels.table is not None:
        scale = torch.maximum(high, -low).clamp_min(1e-12) * ratio
        return scale, torch.zeros_like(scale)
    if levels.sym:
        middle = (levels.top + 1) // 2
        widest = torch.maximum(high, -low).clamp_min(1e-12) * ratio
        scale = widest / middle if levels.signed else widest * 2 / levels.top
        if levels.signed:  # the longer side of the range has one level more
            scale = torch.where(-low > high, scale, -scale)
        return _stored(scale, levels.dtype), torch.full_like(scale, middle)
    low, high = low.clamp_max(0) * ratio, high.clamp_min(0) * ratio
    scale = _stored((high - low).clamp_min(1e-5) / levels.top, levels.dtype)
    return scale, torch.round(-low / scale).clamp_(0, levels.top)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale of either sign as a reader sees it."""
    return stored(scale.abs(), dtype).copysign(scale)


def nearest(weights: Tensor, scale: Tensor, zero: Tensor, levels: Levels) -> Tensor:
    """The level nearest to each of ``weights``, for a scale and zero that broadcast to them."""
    return _level(weights / torch.where(scale == 0, TINY, scale), zero, levels)


def _level(ratio: Tensor, zero: Tensor, levels: Levels) -> Tensor:
    """The same for ``weights / scale``, overwritten where levels are integers."""
    return _within(ratio, levels, -zero, levels.top - zero)


def _within(ratio: Tensor, levels: Levels, least: Tensor, most: Tensor) -> Tensor:
    """The same; integers are ``least`` to ``most``."""
    if levels.table is None:
        return torch.minimum(torch.maximum(ratio.round_(), least), most)
    parts = _parts(levels.table, ratio.device)
    place = ((ratio + parts.shift) * parts.number).nan_to_num_(0.0)  # of no number: some level, as of any search
    part = place.clamp_(0, len(parts.middle) - 1).long().flatten()
    middle, below, above = (
        one.index_select(0, part).view_as(ratio) for one in (parts.middle, parts.below, parts.above)
    )
    return torch.where(ratio > middle, above, below)


class _Parts(NamedTuple):
    """A table's range in equal parts, none with more than one middle between two levels in it: a look-up and one
    comparison take a fifth of a binary search. ``number`` of them to one; ``shift``: what puts the first at zero;
    ``middle``: of each part, infinite for none; the levels ``below`` and ``above`` it."""

    shift: float
    number: float
    middle: Tensor
    below: Tensor
    above: Tensor


@cache
def _parts(values: tuple[float, ...], device: torch.device) -> _Parts:
    """Parts at whose edges no middle lies, within what rounding may do to a ratio."""
    table = torch.tensor(values)
    middles, shift = (table[1:] + table[:-1]) / 2, -values[0]
    places = (middles + shift).double()
    for number in (halves / 2 for halves in range(16, 1 << 16)):
        scaled = places * number
        apart = len(set(scaled.long().tolist())) == len(middles)
        if apart and float((scaled - scaled.round()).abs().min()) > EDGE * number:
            break
    else:
        raise ValueError("levels too near to each other")
    own = dict(zip(scaled.long().tolist(), range(len(middles)), strict=True))
    starts = torch.arange(int(scaled[-1]) + 2)
    least = torch.bucketize(starts.double() / number, places)  # the level at a part's beginning
    middle = torch.tensor([float(middles[own[n]]) if n in own else torch.inf for n in starts.tolist()])
    above = table[(least + 1).clamp_max(len(table) - 1)]
    return _Parts(shift, number, middle.to(device), table[least].to(device), above.to(device))


def _finalists(aim: Tensor, metric: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Scales and zeros ``[finalists, out]`` of those that lose least by plain rounding."""
    grids = [covering(aim, levels, ratio) for ratio in RATIOS]
    errors = (nearest(aim, *grid, levels).mul_(grid[0]).sub_(aim) for grid in grids)
    losses = torch.stack([_loss(metric, error) for error in errors])
    scale, zero = (torch.stack([grid[part].squeeze(-2) for grid in grids]) for part in (0, 1))
    leaders = []
    for _ in range(FINALISTS):
        leaders.append(losses.argmin(0, keepdim=True))
        losses.scatter_(0, leaders[-1], torch.inf)
    order = torch.cat(leaders)
    return scale.gather(0, order), zero.gather(0, order)


def _loss(metric: Tensor, error: Tensor) -> Tensor:
    return (metric @ error).mul_(error).sum(-2)


def _improve(linear: Tensor, metric: Tensor, levels: Levels, current: Group, scales: bool) -> Group:
    """`improve`, in plain PyTorch."""
    code, scale, zero = current.levels.clone(), current.scale, current.zero
    product = metric @ code
    if scales:
        scale = _best_scale(code, scale, linear, product, levels.dtype)
    gradient, over = torch.addcmul(linear, product, scale), 1 / torch.where(scale == 0, TINY, scale)
    step = over * (1 / metric.diagonal(dim1=-2, dim2=-1).unsqueeze(-1))
    least, most, width = (-zero).squeeze(-2), (levels.top - zero).squeeze(-2), scale.squeeze(-2)
    rows = zip(code.unbind(-2), gradient.unbind(-2), step.unbind(-2), strict=True)
    for column, (old, slope, pace) in enumerate(rows, start=1):
        new = _within(torch.addcmul(old, slope, pace, value=-1), levels, least, most)
        add_outer(gradient[..., column:, :], metric[..., column:, column - 1], (new - old).mul_(width))
        old.copy_(new)
    return Group(code, scale, current.zero)


def _of_each(metric: Tensor, tensor: Tensor) -> Tensor:
    """A metric for each problem, where pieces share one."""
    return metric if metric.ndim == tensor.ndim else metric.expand(len(tensor), *metric.shape).contiguous()


def _kernels(tensor: Tensor) -> ModuleType | None:
    """The Triton twins, where they run for groups of so many columns ``[g, out]``."""
    if not tensor.is_cuda:
        return None
    from qtool.quantize import descent_kernels

    return descent_kernels if descent_kernels.fits(tensor.shape[-2]) else None


def _best_scale(code: Tensor, scale: Tensor, linear: Tensor, product: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale with the least loss for these levels, where storing it leaves a gain; ``product``: metric @ code."""
    curve = (code * product).sum(-2, keepdim=True)
    slope = (code * linear).sum(-2, keepdim=True) + scale * curve
    wished = scale - slope / curve.clamp_min(1e-30)
    step = (wished if dtype == torch.float32 else _stored(wished, dtype)) - scale
    helps = (2 * step * slope + step * step * curve < 0) & (wished * scale > 0) & (curve > 0)
    return scale + torch.where(helps, step, 0.0)
