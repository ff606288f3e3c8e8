"""ggml's block types by descent: what a file stores of each block, chosen so that errors make up for each other.

A super-block of 256 columns holds sub-blocks, whose weights are ``d * step * code - dmin * minimum``: float16 d and
dmin, small integers step and minimum, codes of four to six bits. Types without super-blocks have a float16 scale (and
minimum) for 32 columns. Both are an affine grid whose two numbers come from a set: multiples of d and dmin, or float16.

As in ../descent.py: one pass from left to right, in which the columns behind take up what a sub-block loses; then
sweeps over all sub-blocks, each with all others known. At a sub-block several pairs of scale and shift are tried, each
with codes by coordinate descent: what it has, the least-squares pair for its codes and its neighbours, and ranges of
the weights that it should have. After its sub-blocks a super-block gets the d and dmin that fit all of them best.
As there, every function takes one problem or a stack of E with a leading axis on all tensors: experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.convert.formats.gguf.ggml import GgmlBlocks
from qtool.quantize import descent
from qtool.quantize.descent import Group
from qtool.quantize.grid import diagonal_blocks
from qtool.quantize.methods.ggml import quantize_ggml
from qtool.quantize.methods.kquant_blocks import KINDS, VISIT, Chosen, Kind, Stored, count_of, of_blocks
from qtool.quantize.methods.kquant_candidates import HALF_MAX
from qtool.quantize.precision import add_product, subtract_product, tensor_float32
from qtool.quantize.rounding import Factor, residual_metric

SWEEPS = 3
ROUNDS = 2  # at a sub-block in the first pass: its second starts from the codes that the first found
RATIOS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # of the range of the weights wanted
FINALISTS = 2
TINY = 1e-30


def quantize(target: Tensor, factor: Factor, gram: Tensor, type_name: str) -> GgmlBlocks:
    """``target`` float32 ``[out, in]`` in blocks that lose less on inputs of the damped Gram matrix ``gram [in, in]``,
    row by row, than those that ggml finds with its diagonal; of a stack the rows of one problem below the other's.
    ``factor``: of the same matrix. A float type has none."""
    plain = _search(target, type_name, gram.diagonal(dim1=-2, dim2=-1))
    if type_name not in KINDS:
        return plain
    blocks = descend(target, begin(target, factor, type_name), gram, SWEEPS).blocks(type_name)
    worse = _row_loss(blocks, target, gram) > _row_loss(plain, target, gram)
    return GgmlBlocks(torch.where(worse, plain.data, blocks.data), type_name, blocks.shape)


def _row_loss(blocks: GgmlBlocks, target: Tensor, gram: Tensor) -> Tensor:
    """``[rows of all problems, 1]``."""
    error = blocks.dequantize().view_as(target).sub_(target)
    return ((error @ gram) * error).sum(-1).view(-1, 1)


def _search(weights: Tensor, type_name: str, importance: Tensor) -> GgmlBlocks:
    """ggml's own blocks for ``[out, in]``, columns weighed by ``importance [in]``; of a stack all rows together."""
    importance = importance / importance.mean(-1, keepdim=True)
    if weights.ndim == 2:
        return quantize_ggml(weights, type_name, importance)
    found = [quantize_ggml(*one) for one in zip(weights, [type_name] * len(weights), importance, strict=True)]
    data = torch.cat([blocks.data for blocks in found])
    return GgmlBlocks(data, type_name, (len(data), weights.shape[-1]))


def workspace(out: int, columns: int) -> int:
    """Float32 numbers that `quantize` takes at most: what is wanted, codes before and after, the error and a product;
    a visit's columns, and the candidates of a sub-block."""
    return 9 * out * columns // 2 + 4 * out * VISIT


def begin(target: Tensor, factor: Factor, type_name: str) -> Chosen:
    """One pass from left to right. ``target`` float32 ``[out, in]``, unchanged; ``factor``: of the damped Gram matrix,
    in the columns' order. d and dmin are those that ggml finds for the weights wanted, importance being what an error
    costs after the columns behind did their best."""
    kind, weight = KINDS[type_name], target.clone()
    chosen = _empty(weight, kind)
    metrics = residual_metric(diagonal_blocks(factor.upper, kind.size))
    for visit in _visits(weight.shape[-1]):
        upper, aims = factor.upper[..., visit, visit], weight[..., visit].clone()
        _start(chosen, visit, aims, upper, type_name)
        stored, spread = chosen.stored(visit.start // VISIT), torch.empty_like(aims)
        for start in range(0, aims.shape[-1], kind.size):
            here = slice(start, start + kind.size)
            columns = slice(visit.start + start, visit.start + here.stop)
            number = columns.start // kind.size
            aim = aims[..., here].contiguous()
            problem = Problem(aim, torch.zeros_like(aim), aim, metrics[number])
            for done in range(ROUNDS):
                _visit(chosen, number, problem, stored, ranges=done == 0)
            error = aim - chosen.weights(columns)
            spread[..., here] = torch.linalg.solve_triangular(upper[..., here, here], error, upper=True, left=False)
            add_product(aims[..., here.stop :], spread[..., here], upper[..., here, here.stop :], -1)
        subtract_product(weight[..., visit.stop :], spread, factor.upper[..., visit, visit.stop :])
    return chosen


def descend(target: Tensor, chosen: Chosen, gram: Tensor, sweeps: int = SWEEPS) -> Chosen:
    """Come back to each sub-block ``sweeps`` times, all others held; never a higher loss than before. ``gram [in,
    in]``: symmetric and positive definite."""
    kind = chosen.kind
    chosen = Chosen(kind, *(part.clone() for part in chosen.numbers))
    error = chosen.weights().sub_(target)
    for _ in range(sweeps):
        for visit in _visits(target.shape[-1]):
            metric = gram[..., visit, visit]
            with tensor_float32():
                slope = error @ gram[..., visit]
            stored = chosen.stored(visit.start // VISIT)
            for start in range(0, metric.shape[-1], kind.size):
                inside = slice(start, start + kind.size)
                columns, number = (
                    slice(visit.start + start, visit.start + inside.stop),
                    (visit.start + start) // kind.size,
                )
                here, own = chosen.weights(columns), slope[..., inside].contiguous()
                _visit(chosen, number, Problem(here, own, here, metric[..., inside, inside].contiguous()), stored)
                add_product(slope, chosen.weights(columns) - here, metric[..., inside, :])
            if kind.steps is not None:
                _refit(chosen, visit, slope, metric)
            torch.sub(chosen.weights(visit), target[..., visit], out=error[..., visit])
    return chosen


def _visits(columns: int) -> Iterator[slice]:
    return (slice(start, min(start + VISIT, columns)) for start in range(0, columns, VISIT))


def _empty(weight: Tensor, kind: Kind) -> Chosen:
    *rows, columns = weight.shape
    scale, shift = weight.new_zeros(2, *rows, columns // kind.size)
    d, dmin = weight.new_zeros(2, *rows, -(-columns // VISIT))
    return Chosen(kind, torch.empty_like(weight), scale, shift, d, dmin)


def _start(chosen: Chosen, visit: slice, aim: Tensor, upper: Tensor, type_name: str) -> None:
    """ggml's own blocks for the weights ``aim [out, visit]``."""
    found = of_blocks(_search(aim, type_name, residual_metric(upper).diagonal(dim1=-2, dim2=-1)))
    codes, scale, shift, d, dmin = (part.view(*aim.shape[:-1], -1) for part in found.numbers)
    size, number = chosen.kind.size, visit.start // VISIT
    subs = slice(visit.start // size, visit.stop // size)
    chosen.codes[..., visit], chosen.scale[..., subs], chosen.shift[..., subs] = codes, scale, shift
    if chosen.kind.steps is not None:
        chosen.d[..., number : number + 1], chosen.dmin[..., number : number + 1] = d, dmin


@dataclass(frozen=True)
class Problem:
    """The loss of a sub-block's weights w ``[out, g]``: with e = w - here, ``e (2 slope + e metric)ᵀ``, so 0 at
    ``here``. ``aim``: weights near its minimum, from which candidates are made; ``metric [g, g]``."""

    here: Tensor
    slope: Tensor
    aim: Tensor
    metric: Tensor


@dataclass(frozen=True)
class _Pairs:
    """Starts, one below the other: ``codes [n, out, size]``, ``scale`` and ``shift [n, out, 1]``."""

    codes: Tensor
    scale: Tensor
    shift: Tensor

    def pick(self, rank: Tensor) -> _Pairs:
        """By row; ``rank [m, out]``."""
        place = rank.unsqueeze(-1)
        codes = self.codes.gather(0, place.expand(*rank.shape, self.codes.shape[-1]))
        return _Pairs(codes, self.scale.gather(0, place), self.shift.gather(0, place))


def _visit(chosen: Chosen, number: int, problem: Problem, stored: Stored, ranges: bool = False) -> None:
    """Scale, shift and codes of sub-block ``number``; ``ranges``: those of ``problem.aim`` are tried, too."""
    kind, one, size = chosen.kind, slice(number, number + 1), chosen.kind.size
    columns = slice(number * size, (number + 1) * size)
    current = _Pairs(chosen.codes[None, ..., columns], chosen.scale[None, ..., one], chosen.shift[None, ..., one])
    starts = [current, _least_squares(problem, current, stored)]
    if ranges:
        starts.append(_ranges(problem, stored))
    best = _best(problem, kind, starts)
    chosen.codes[..., columns], chosen.scale[..., one] = best.codes[0], best.scale[0]
    chosen.shift[..., one] = best.shift[0]


def _least_squares(problem: Problem, current: _Pairs, stored: Stored) -> _Pairs:
    """The scale that is best for these codes, and its neighbours, each with the shift that is best beside it."""
    codes, scale, shift = current.codes[0], current.scale[0], current.shift[0]
    gap = codes * scale - shift - problem.here
    half = add_product(problem.slope.clone(), gap, problem.metric)  # of the gradient
    product = codes @ problem.metric
    curve, lean = (codes * product).sum(-1, keepdim=True), (codes * half).sum(-1, keepdim=True)
    if not stored.kind.affine:
        scales = stored.scale((scale - lean / curve.clamp_min(TINY))[None], nudged=True)
        return _Pairs(codes.expand(len(scales), *codes.shape), scales, shift.expand_as(scales))
    ones = problem.metric.sum((-2, -1), keepdim=True).clamp_min(TINY)
    cross, level = product.sum(-1, keepdim=True), half.sum(-1, keepdim=True)
    rest = curve - cross * cross / ones  # of the scale, once the shift follows
    step = torch.where(rest > 1e-6 * curve, (cross * level / ones - lean) / rest.clamp_min(TINY), 0.0)
    scales = stored.scale((scale + step)[None], nudged=True)
    shifts = stored.shift(shift + (level + (scales - scale) * cross) / ones)
    return _Pairs(codes.expand(len(scales), *codes.shape), scales, shifts)


def _ranges(problem: Problem, stored: Stored) -> _Pairs:
    """FINALISTS among RATIOS of the range of ``problem.aim``, by plain rounding."""
    kind, aim = stored.kind, problem.aim
    low, high = aim.aminmax(dim=-1, keepdim=True)
    ratios = torch.tensor(RATIOS, device=aim.device).view(-1, *[1] * aim.ndim)
    if kind.affine:
        low = low.clamp_max(0)
        scale = stored.scale((high.clamp_min(0) - low) * ratios / kind.top)
        shift = stored.shift(low * -ratios)
    else:
        widest = torch.where(-low > high, -low, -high)  # the longer side has one level more
        scale = stored.scale(widest * ratios / -kind.low)
        shift = torch.zeros_like(scale)
    pairs = _Pairs(_nearest(aim, scale, shift, kind), scale, shift)
    return pairs.pick(_loss(problem, pairs).argsort(0)[:FINALISTS])


def _nearest(weights: Tensor, scale: Tensor, shift: Tensor, kind: Kind) -> Tensor:
    ratio = (weights + shift) / torch.where(scale == 0, TINY, scale)
    return ratio.round_().clamp_(kind.low, kind.low + kind.top)


def _loss(problem: Problem, pairs: _Pairs) -> Tensor:
    """``[n, out]``."""
    gap = pairs.codes * pairs.scale - pairs.shift - problem.here
    return ((gap @ problem.metric + 2 * problem.slope) * gap).sum(-1)


def _best(problem: Problem, kind: Kind, starts: list[_Pairs]) -> _Pairs:
    """Every start with codes by coordinate descent, all in one call; the best by row."""
    codes, scale, shift = (torch.cat(part) for part in zip(*((p.codes, p.scale, p.shift) for p in starts), strict=True))
    linear = _columns(problem.slope - (problem.here + shift) @ problem.metric)
    scales = _columns(scale)
    group = Group(_columns(codes), scales, torch.full_like(scales, -kind.low))
    better = descent.improve(linear, problem.metric, kind.levels, group, scales=False).levels
    codes = better.mT.unflatten(-2, (len(codes), -1)).movedim(-3, 0)
    found = _Pairs(codes, scale, shift)
    return found.pick(_loss(problem, found).argmin(0, keepdim=True))


def _columns(starts: Tensor) -> Tensor:
    """``[n, out, g]`` -> ``[g, n * out]``."""
    return starts.movedim(0, -3).flatten(-3, -2).mT.contiguous()


def _refit(chosen: Chosen, visit: slice, slope: Tensor, metric: Tensor) -> None:
    """d and dmin of a super-block by least squares, all its integers held. ``slope``: half the gradient there."""
    kind, number = chosen.kind, visit.start // VISIT
    above, subs = slice(number, number + 1), slice(visit.start // kind.size, visit.stop // kind.size)
    d, dmin = chosen.d[..., above], chosen.dmin[..., above]
    steps, minima = count_of(chosen.scale[..., subs], d), count_of(chosen.shift[..., subs], dmin)
    of_d = (chosen.codes[..., visit].unflatten(-1, (-1, kind.size)) * steps.unsqueeze(-1)).flatten(-2)
    of_dmin = -minima.repeat_interleave(kind.size, -1)
    with tensor_float32():
        d_product, dmin_product = of_d @ metric, of_dmin @ metric
    a, b = (of_d * slope).sum(-1, keepdim=True), (of_dmin * slope).sum(-1, keepdim=True)
    dd, mm = (of_d * d_product).sum(-1, keepdim=True), (of_dmin * dmin_product).sum(-1, keepdim=True)
    dm = (of_d * dmin_product).sum(-1, keepdim=True)
    both = dd * mm - dm * dm
    sound = both > 1e-6 * dd * mm
    by_d = torch.where(sound, (dm * b - mm * a) / both.clamp_min(TINY), -a / dd.clamp_min(TINY))
    by_dmin = torch.where(sound, (dm * a - dd * b) / both.clamp_min(TINY), 0.0)
    by_d = _half_positive(d, by_d) - d
    by_dmin = _half_positive(dmin, by_dmin) - dmin
    change = 2 * (by_d * a + by_dmin * b) + by_d**2 * dd + by_dmin**2 * mm + 2 * by_d * by_dmin * dm
    helps = change < 0
    d, dmin = torch.where(helps, d + by_d, d), torch.where(helps, dmin + by_dmin, dmin)
    chosen.d[..., above], chosen.dmin[..., above] = d, dmin
    chosen.scale[..., subs], chosen.shift[..., subs] = steps * d, minima * dmin


def _half_positive(value: Tensor, step: Tensor) -> Tensor:
    """``value + step`` as float16, where that keeps its sign; else ``value``."""
    moved = (value + step).clamp(-HALF_MAX, HALF_MAX).half().float()
    return torch.where(moved * value > 0, moved, value)
