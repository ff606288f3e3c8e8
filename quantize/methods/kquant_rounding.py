"""ggml's block types by descent: what a file stores of each block, chosen so that errors make up for each other.

A super-block of 256 columns holds sub-blocks, whose weights are ``d * step * code - dmin * minimum``: float16 d and
dmin, small integers step and minimum, codes of four to six bits. Types without super-blocks have a float16 scale (and
minimum) for 32 columns. Both are an affine grid whose two numbers come from a set: multiples of d and dmin, or float16.

As in ../descent.py: one pass from left to right, in which the columns behind take up what a sub-block loses; then
sweeps over all sub-blocks, each with all others known. At a sub-block several pairs of scale and shift are tried, each
with codes by coordinate descent: what it has, the least-squares pair for its codes and its neighbours, and ranges of
the weights that it should have. After its sub-blocks a super-block gets the d and dmin that fit all of them best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.convert.formats.gguf.ggml import BLOCKS, GgmlBlocks
from qtool.convert.formats.gguf.ggml_fields import Fields, pack
from qtool.quantize import descent
from qtool.quantize.descent import Group, Levels, Problem
from qtool.quantize.grid import diagonal_blocks
from qtool.quantize.methods.ggml import quantize_ggml
from qtool.quantize.methods.kquant_candidates import HALF_MAX
from qtool.quantize.precision import subtract_product, tensor_float32
from qtool.quantize.rounding import Factor, residual_metric

SWEEPS = 3
VISIT = 256  # columns whose errors meet the others' in one product: a super-block, or eight blocks
RATIOS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # of the range of the weights wanted
FINALISTS = 2
TINY = 1e-30


@dataclass(frozen=True)
class Kind:
    """``size``: columns of a sub-block; ``low``: the least code, ``top`` more the greatest; ``steps``: the least and
    greatest multiple of d, None where a block has a float16 scale of its own; ``affine``: with a shift."""

    size: int
    low: int
    top: int
    steps: tuple[int, int] | None
    affine: bool

    @property
    def levels(self) -> Levels:
        """For `descent.choose`, of weights that the shift was added to."""
        return Levels(self.top, self.size, torch.float32, sym=not self.affine)


KINDS = {
    "Q4_K": Kind(32, 0, 15, (0, 63), True), "Q5_K": Kind(32, 0, 31, (0, 63), True),
    "Q6_K": Kind(16, -32, 63, (-128, 127), False), "Q5_1": Kind(32, 0, 31, None, True),
    "Q5_0": Kind(32, -16, 31, None, False), "Q8_0": Kind(32, -128, 255, None, False),
}  # fmt: skip


@dataclass
class Chosen:
    """``codes [out, in]``; ``scale, shift [out, in / size]`` with ``weight = scale * code - shift``, as stored; of
    super-blocks ``d, dmin [out, in / 256]``, which scale and shift are multiples of. All float32."""

    kind: Kind
    codes: Tensor
    scale: Tensor
    shift: Tensor
    d: Tensor
    dmin: Tensor

    def weights(self) -> Tensor:
        """What llama.cpp reads, ``[out, in]``."""
        codes = self.codes.unflatten(1, (-1, self.kind.size))
        return (codes * self.scale.unsqueeze(-1) - self.shift.unsqueeze(-1)).flatten(1)

    def blocks(self, type_name: str) -> GgmlBlocks:
        """As bytes."""
        out, columns = self.codes.shape
        elements = BLOCKS[type_name][0]
        subs = elements // self.kind.size
        codes, scale, shift = self.codes.reshape(-1, elements), self.scale.reshape(-1, subs), self.shift.reshape(-1, subs)
        if self.kind.steps is None:
            one = torch.ones_like(scale)
            fields = Fields(scale[:, 0], shift[:, 0], one, one if self.kind.affine else 0 * one, codes)
        else:
            d, dmin = self.d.reshape(-1), self.dmin.reshape(-1)
            fields = Fields(d, dmin, _count(scale, d[:, None]), _count(shift, dmin[:, None]), codes)
        return GgmlBlocks(pack(fields, type_name).view(out, -1), type_name, (out, columns))


def of_blocks(blocks: GgmlBlocks) -> Chosen:
    """What ggml's own search, or an earlier one here, chose."""
    kind, fields, out = KINDS[blocks.type], blocks.fields(), blocks.shape[0]
    d, dmin = fields.d.view(out, -1), fields.dmin.view(out, -1)
    scale, shift = fields.d[:, None] * fields.steps, fields.dmin[:, None] * fields.minima
    return Chosen(kind, fields.codes.view(out, -1), scale.view(out, -1), shift.view(out, -1), d, dmin)


def quantize(target: Tensor, factor: Factor, gram: Tensor, type_name: str) -> GgmlBlocks:
    """``target`` float32 ``[out, in]`` in blocks that lose less on inputs of the damped Gram matrix ``gram [in, in]``,
    row by row, than those that ggml finds with its diagonal. ``factor``: of the same matrix. A float type has none."""
    plain = quantize_ggml(target, type_name, gram.diagonal() / gram.diagonal().mean())
    if type_name not in KINDS:
        return plain
    blocks = descend(target, begin(target, factor, type_name), gram).blocks(type_name)
    worse = _row_loss(blocks, target, gram) > _row_loss(plain, target, gram)
    return GgmlBlocks(torch.where(worse, plain.data, blocks.data), type_name, blocks.shape)


def _row_loss(blocks: GgmlBlocks, target: Tensor, gram: Tensor) -> Tensor:
    """``[out, 1]``."""
    error = blocks.dequantize().sub_(target)
    return ((error @ gram) * error).sum(1, keepdim=True)


def workspace(out: int, columns: int) -> int:
    """Float32 numbers that `quantize` takes at most."""
    return 6 * out * columns + 16 * out * VISIT


def begin(target: Tensor, factor: Factor, type_name: str) -> Chosen:
    """One pass from left to right. ``target`` float32 ``[out, in]``, unchanged; ``factor``: of the damped Gram matrix,
    in the columns' order. d and dmin are those that ggml finds for the weights wanted, importance being what an error
    costs after the columns behind did their best."""
    kind, weight = KINDS[type_name], target.clone()
    chosen = _empty(weight, kind)
    metrics = residual_metric(diagonal_blocks(factor.upper, kind.size))
    for visit in _visits(weight.shape[1]):
        upper, aims = factor.upper[visit, visit], weight[:, visit].clone()
        _start(chosen, visit, aims, upper, type_name)
        spread = torch.empty_like(aims)
        for start in range(0, aims.shape[1], kind.size):
            here = slice(start, start + kind.size)
            number = (visit.start + start) // kind.size
            aim = aims[:, here].contiguous()
            problem = Problem(aim, torch.zeros_like(aim), aim, metrics[number])
            _visit(chosen, number, problem, visit.start // VISIT, True)
            error = aim - _weights(chosen, number)
            spread[:, here] = torch.linalg.solve_triangular(upper[here, here], error, upper=True, left=False)
            aims[:, here.stop :].addmm_(spread[:, here], upper[here, here.stop :], alpha=-1)
        subtract_product(weight[:, visit.stop :], spread, factor.upper[visit, visit.stop :])
    return chosen


def descend(target: Tensor, chosen: Chosen, gram: Tensor, sweeps: int = SWEEPS) -> Chosen:
    """Come back to each sub-block ``sweeps`` times, all others held; never a higher loss than before. ``gram [in,
    in]``: symmetric and positive definite."""
    kind = chosen.kind
    chosen = Chosen(kind, *(part.clone() for part in _parts(chosen)))
    inverses = torch.linalg.inv(diagonal_blocks(gram, kind.size))
    error = chosen.weights().sub_(target)
    for sweep in range(sweeps):
        for visit in _visits(target.shape[1]):
            metric = gram[visit, visit]
            with tensor_float32():
                slope = error @ gram[:, visit]
            for start in range(0, metric.shape[0], kind.size):
                inside = slice(start, start + kind.size)
                number = (visit.start + start) // kind.size
                here, own = _weights(chosen, number), slope[:, inside].contiguous()
                problem = Problem(here, own, here - own @ inverses[number], metric[inside, inside].contiguous())
                _visit(chosen, number, problem, visit.start // VISIT, sweep == 0)
                slope.addmm_(_weights(chosen, number) - here, metric[inside])
            if kind.steps is not None:
                _refit(chosen, visit, slope, metric)
            block = slice(visit.start // kind.size, visit.stop // kind.size)
            codes = chosen.codes[:, visit].unflatten(1, (-1, kind.size))
            read = codes * chosen.scale[:, block].unsqueeze(-1) - chosen.shift[:, block].unsqueeze(-1)
            torch.sub(read.flatten(1), target[:, visit], out=error[:, visit])
    return chosen


def _visits(columns: int) -> Iterator[slice]:
    return (slice(start, min(start + VISIT, columns)) for start in range(0, columns, VISIT))


def _parts(chosen: Chosen) -> tuple[Tensor, ...]:
    return chosen.codes, chosen.scale, chosen.shift, chosen.d, chosen.dmin


def _empty(weight: Tensor, kind: Kind) -> Chosen:
    out, columns = weight.shape
    scale, shift = weight.new_zeros(2, out, columns // kind.size)
    d, dmin = weight.new_zeros(2, out, -(-columns // VISIT))
    return Chosen(kind, torch.empty_like(weight), scale, shift, d, dmin)


def _start(chosen: Chosen, visit: slice, aim: Tensor, upper: Tensor, type_name: str) -> None:
    """ggml's own blocks for the weights ``aim [out, visit]``."""
    importance = residual_metric(upper).diagonal()
    found = of_blocks(quantize_ggml(aim, type_name, importance / importance.mean()))
    size, number = chosen.kind.size, visit.start // VISIT
    subs = slice(visit.start // size, visit.stop // size)
    chosen.codes[:, visit], chosen.scale[:, subs], chosen.shift[:, subs] = found.codes, found.scale, found.shift
    if chosen.kind.steps is not None:
        chosen.d[:, number : number + 1], chosen.dmin[:, number : number + 1] = found.d, found.dmin


def _weights(chosen: Chosen, number: int) -> Tensor:
    """Of a sub-block ``[out, size]``."""
    size, one = chosen.kind.size, slice(number, number + 1)
    return chosen.codes[:, number * size : (number + 1) * size] * chosen.scale[:, one] - chosen.shift[:, one]


def _count(value: Tensor, unit: Tensor) -> Tensor:
    """How often ``unit`` makes up ``value``."""
    return torch.where(unit == 0, 0.0, value / torch.where(unit == 0, 1.0, unit)).round()


@dataclass(frozen=True)
class _Stored:
    """The scales and shifts that a sub-block may have: ``unit [out, 1]`` d and dmin, used where ``kind`` has steps."""

    kind: Kind
    d: Tensor
    dmin: Tensor

    def scale(self, wished: Tensor, more: int = 0) -> Tensor:
        """The nearest to ``wished``, and ``more`` steps on."""
        if self.kind.steps is None:
            return wished.clamp(-HALF_MAX, HALF_MAX).half().float()
        return (_count(wished, self.d) + more).clamp(*self.kind.steps) * self.d

    def shift(self, wished: Tensor) -> Tensor:
        if self.kind.steps is None:
            return wished.clamp(-HALF_MAX, HALF_MAX).half().float()
        return _count(wished, self.dmin).clamp(*self.kind.steps) * self.dmin


@dataclass(frozen=True)
class _Pair:
    """A start: ``codes [out, size]``, ``scale`` and ``shift [out, 1]``."""

    codes: Tensor
    scale: Tensor
    shift: Tensor


def _visit(chosen: Chosen, number: int, problem: Problem, above: int, ranges: bool) -> None:
    """Scale, shift and codes of sub-block ``number``; ``ranges``: those of the weights wanted are tried, too."""
    kind, one, size = chosen.kind, slice(number, number + 1), chosen.kind.size
    columns = slice(number * size, (number + 1) * size)
    stored = _Stored(kind, chosen.d[:, above : above + 1], chosen.dmin[:, above : above + 1])
    current = _Pair(chosen.codes[:, columns], chosen.scale[:, one], chosen.shift[:, one])
    starts = [current, *_least_squares(problem, current, stored)]
    if ranges:
        starts += _ranges(problem, stored)
    best = _best(problem, kind, starts)
    chosen.codes[:, columns], chosen.scale[:, one], chosen.shift[:, one] = best.codes, best.scale, best.shift


def _least_squares(problem: Problem, current: _Pair, stored: _Stored) -> list[_Pair]:
    """The scale that is best for these codes, and its neighbours, each with the shift that is best beside it."""
    codes = current.codes
    gap = codes * current.scale - current.shift - problem.here
    half = problem.slope + gap @ problem.metric  # half the gradient
    product = codes @ problem.metric
    curve, lean = (codes * product).sum(1, keepdim=True), (codes * half).sum(1, keepdim=True)
    if not stored.kind.affine:
        wished = current.scale - lean / curve.clamp_min(TINY)
        return [_Pair(codes, stored.scale(wished, more), current.shift) for more in _nudges(stored)]
    ones = problem.metric.sum().clamp_min(TINY)
    cross, level = product.sum(1, keepdim=True), half.sum(1, keepdim=True)
    rest = curve - cross * cross / ones  # of the scale, once the shift follows
    step = torch.where(rest > 1e-6 * curve, (cross * level / ones - lean) / rest.clamp_min(TINY), 0.0)
    pairs = []
    for more in _nudges(stored):
        scale = stored.scale(current.scale + step, more)
        shift = current.shift + (level + (scale - current.scale) * cross) / ones
        pairs.append(_Pair(codes, scale, stored.shift(shift)))
    return pairs


def _nudges(stored: _Stored) -> tuple[int, ...]:
    return (0,) if stored.kind.steps is None else (-1, 0, 1)


def _ranges(problem: Problem, stored: _Stored) -> list[_Pair]:
    """FINALISTS among RATIOS of the range of ``problem.aim``, by plain rounding."""
    kind, aim = stored.kind, problem.aim
    low, high = aim.amin(1, keepdim=True), aim.amax(1, keepdim=True)
    pairs = []
    for ratio in RATIOS:
        if kind.affine:
            scale = stored.scale((high.clamp_min(0) - low.clamp_max(0)) * ratio / kind.top)
            shift = stored.shift(low.clamp_max(0) * -ratio)
        else:
            widest = torch.maximum(high, -low) * ratio / -kind.low
            scale, shift = stored.scale(torch.where(-low > high, widest, -widest)), torch.zeros_like(low)
        pairs.append(_Pair(_nearest(aim, scale, shift, kind), scale, shift))
    losses = torch.cat([_loss(problem, pair) for pair in pairs], 1)
    order = losses.argsort(1)[:, :FINALISTS]
    return [_pick(pairs, rank) for rank in order.split(1, 1)]


def _nearest(weights: Tensor, scale: Tensor, shift: Tensor, kind: Kind) -> Tensor:
    ratio = (weights + shift) / torch.where(scale == 0, TINY, scale)
    return ratio.round_().clamp_(kind.low, kind.low + kind.top)


def _loss(problem: Problem, pair: _Pair) -> Tensor:
    """``[out, 1]``."""
    gap = pair.codes * pair.scale - pair.shift - problem.here
    return ((gap @ problem.metric + 2 * problem.slope) * gap).sum(1, keepdim=True)


def _pick(pairs: list[_Pair], rank: Tensor) -> _Pair:
    """By row; ``rank [out, 1]``."""
    codes = torch.stack([pair.codes for pair in pairs])
    picked = codes.gather(0, rank.t().unsqueeze(-1).expand(1, -1, codes.shape[2])).squeeze(0)
    scales, shifts = (torch.cat(part, 1) for part in ([p.scale for p in pairs], [p.shift for p in pairs]))
    return _Pair(picked, scales.gather(1, rank), shifts.gather(1, rank))


def _best(problem: Problem, kind: Kind, starts: list[_Pair]) -> _Pair:
    """Every start with codes by coordinate descent, all in one call; the best by row."""
    count, out = len(starts), problem.here.shape[0]
    shift, scale = (torch.cat(part) for part in ([p.shift for p in starts], [p.scale for p in starts]))
    zero = torch.full_like(scale, -kind.low)
    here, slope, aim = (part.repeat(count, 1) for part in (problem.here, problem.slope, problem.aim))
    shifted = Problem(here + shift, slope, aim + shift, problem.metric)
    group = Group(torch.cat([pair.codes for pair in starts]), scale, zero)
    codes = descent.choose(shifted, kind.levels, (), group, scales=False).levels
    parts = zip(codes.split(out), scale.split(out), shift.split(out), strict=True)
    found = [_Pair(*part) for part in parts]
    losses = torch.cat([_loss(problem, pair) for pair in found], 1)
    return _pick(found, losses.argmin(1, keepdim=True))


def _refit(chosen: Chosen, visit: slice, slope: Tensor, metric: Tensor) -> None:
    """d and dmin of a super-block by least squares, all its integers held. ``slope``: half the gradient there."""
    kind, number = chosen.kind, visit.start // VISIT
    above, subs = slice(number, number + 1), slice(visit.start // kind.size, visit.stop // kind.size)
    d, dmin = chosen.d[:, above], chosen.dmin[:, above]
    steps, minima = _count(chosen.scale[:, subs], d), _count(chosen.shift[:, subs], dmin)
    of_d = (chosen.codes[:, visit].unflatten(1, (-1, kind.size)) * steps.unsqueeze(-1)).flatten(1)
    of_dmin = -minima.repeat_interleave(kind.size, 1)
    with tensor_float32():
        d_product, dmin_product = of_d @ metric, of_dmin @ metric
    a, b = (of_d * slope).sum(1, keepdim=True), (of_dmin * slope).sum(1, keepdim=True)
    dd, mm = (of_d * d_product).sum(1, keepdim=True), (of_dmin * dmin_product).sum(1, keepdim=True)
    dm = (of_d * dmin_product).sum(1, keepdim=True)
    both = dd * mm - dm * dm
    sound = both > 1e-6 * dd * mm
    by_d = torch.where(sound, (dm * b - mm * a) / both.clamp_min(TINY), -a / dd.clamp_min(TINY))
    by_dmin = torch.where(sound, (dm * a - dd * b) / both.clamp_min(TINY), 0.0)
    by_d = _half_positive(d, by_d) - d
    by_dmin = _half_positive(dmin, by_dmin) - dmin
    change = 2 * (by_d * a + by_dmin * b) + by_d**2 * dd + by_dmin**2 * mm + 2 * by_d * by_dmin * dm
    helps = change < 0
    d, dmin = torch.where(helps, d + by_d, d), torch.where(helps, dmin + by_dmin, dmin)
    chosen.d[:, above], chosen.dmin[:, above] = d, dmin
    chosen.scale[:, subs], chosen.shift[:, subs] = steps * d, minima * dmin


def _half_positive(value: Tensor, step: Tensor) -> Tensor:
    """``value + step`` as float16, where that keeps its sign; else ``value``."""
    moved = (value + step).clamp(-HALF_MAX, HALF_MAX).half().float()
    return torch.where(moved * value > 0, moved, value)
