"""A visit to the columns of a super-block: each sub-block's scale, shift and codes in turn, all others held.

Several pairs of scale and shift are tried, each with codes by coordinate descent: what the sub-block has, the
least-squares pair for its codes and its neighbours, and (in the first pass) ranges of the weights that it should have.
On an accelerator the Triton twin does a whole visit in one launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.quantize import descent
from qtool.quantize.chosen import Group
from qtool.quantize.grid import diagonal_blocks
from qtool.quantize.methods.kquant_blocks import Kind
from qtool.quantize.methods.kquant_columns import BlockColumns, Stored
from qtool.quantize.precision import add_product

ROUNDS = 2  # at a sub-block in the first pass: its second starts from the codes that the first found
RATIOS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # of the range of the weights wanted
FINALISTS = 2
TINY = 1e-30


def choose(part: BlockColumns, aims: Tensor, upper: Tensor, inverse: Tensor) -> None:
    """The first visit: all sub-blocks of ``part`` for the weights ``aims [width, out]``, from what ``part`` holds; the
    columns behind a sub-block take up its error. ``upper, inverse [width, width]``: the visit's block of the factor of
    the Gram matrix's inverse, and its own inverse."""
    size, state = part.kind.size, aims.clone(memory_format=torch.contiguous_format)
    blocks = diagonal_blocks(inverse, size)  # of a triangular matrix they are the inverses of its blocks
    own, spread = blocks @ blocks.mT, blocks @ _lines(upper, size)
    _settle(part, state, _of_each(own, state), _of_each(spread, state), first=True)


def revisit(part: BlockColumns, slope: Tensor, metric: Tensor) -> None:
    """Better sub-blocks, all other columns of the matrix held. ``slope [width, out]``: half the gradient of the loss,
    contiguous, which follows what changes; ``metric [width, width]``: contiguous."""
    size = part.kind.size
    own, spread = diagonal_blocks(metric, size), _lines(metric, size)
    _settle(part, slope, _of_each(own, slope), _of_each(spread, slope), first=False)


def _of_each(own: Tensor, state: Tensor) -> Tensor:
    """``[subs, g, n]`` for each problem ``[subs, E, g, n]``, where pieces of one matrix share it."""
    return own.unsqueeze(1).expand(-1, len(state), -1, -1) if own.ndim == state.ndim else own


def _lines(matrix: Tensor, size: int) -> Tensor:
    """``[width, width]`` -> ``[width / size, size, width]``; of a stack ``[width / size, E, size, width]``."""
    lines: Tensor = matrix.unflatten(-2, (-1, size))
    return lines.movedim(-3, 0)


def _settle(part: BlockColumns, state: Tensor, own: Tensor, spread: Tensor, first: bool) -> None:
    """Choose each sub-block of ``part`` in turn. ``state [width, out]`` follows: in the first visit the weights wanted,
    of which those behind a sub-block change; later half the gradient, which changes in all columns. ``own [subs, g,
    g]``: the metric of each sub-block alone; ``spread [subs, g, width]``: what a change of its weights adds to the
    state. Of a stack ``[subs, E, …]``."""
    if state.is_cuda:
        from qtool.quantize.methods import kquant_visit_kernels

        ratios, rounds = (RATIOS, ROUNDS) if first else ((), 1)
        kquant_visit_kernels.settle(part, state, own, spread, ratios, rounds)
        return
    size, stored = part.kind.size, Stored.of(part)
    for number, (metric, change) in enumerate(zip(own, spread, strict=True)):
        one, columns = slice(number, number + 1), slice(number * size, (number + 1) * size)
        before = Pair(part.codes[..., columns, :], part.scale[..., one, :], part.shift[..., one, :])
        goal = state[..., columns, :].contiguous()
        here, behind = (goal, slice(columns.stop, None)) if first else (before.weights(), slice(None))
        if first:
            found = before
            for done in range(ROUNDS):
                problem = Problem(goal, torch.zeros_like(goal), metric @ (found.weights() - goal), metric)
                found = _settle_one(problem, found, stored, ranges=done == 0)
        else:
            found = _settle_one(Problem(here, goal, goal, metric), before, stored)
        part.codes[..., columns, :], part.scale[..., one, :], part.shift[..., one, :] = found.numbers
        add_product(state[..., behind, :], change[..., behind].mT, found.weights() - here)


@dataclass(frozen=True)
class Pair:
    """A setting: ``codes [g, out]``, ``scale`` and ``shift [1, out]``; or n of them, ``[g, n, out]`` and ``[1, n,
    out]``."""

    codes: Tensor
    scale: Tensor
    shift: Tensor

    @property
    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """All tensors, as they are given."""
        return self.codes, self.scale, self.shift

    def weights(self) -> Tensor:
        """What llama.cpp reads."""
        return self.codes * self.scale - self.shift

    def pick(self, rank: Tensor) -> Pair:
        """Of n settings those numbered ``rank [1, m, out]``."""
        shape = (*self.codes.shape[:-2], *rank.shape[-2:])
        return Pair(self.codes.gather(-2, rank.expand(shape)), self.scale.gather(-2, rank), self.shift.gather(-2, rank))


@dataclass(frozen=True)
class Problem:
    """The loss of a sub-block's weights w ``[g, out]``: with e = w - here, ``eᵀ (2 slope + metric e)``, so 0 at
    ``here``. ``half``: of its gradient at the weights that the sub-block has."""

    here: Tensor
    slope: Tensor
    half: Tensor
    metric: Tensor


def _settle_one(problem: Problem, current: Pair, stored: Stored, ranges: bool = False) -> Pair:
    """The best of what is tried; ``ranges``: those of ``problem.here``, too."""
    starts = [Pair(*(part.unsqueeze(-2) for part in current.numbers)), _least_squares(problem, current, stored)]
    if ranges:
        starts.append(_ranges(problem, stored))
    codes, scale, shift = (torch.cat(part, -2) for part in zip(*(start.numbers for start in starts), strict=True))
    best = _best(problem, stored.kind, Pair(codes, scale, shift))
    return Pair(*(part.squeeze(-2) for part in best.numbers))


def _least_squares(problem: Problem, current: Pair, stored: Stored) -> Pair:
    """The scale that is best for these codes, and its neighbours, each with the shift that is best beside it."""
    codes, half = current.codes, problem.half
    product = problem.metric @ codes
    curve, lean, cross, level = (
        one.sum(-2, keepdim=True).unsqueeze(-2) for one in (codes * product, codes * half, product, half)
    )
    scale, shift = current.scale.unsqueeze(-2), current.shift.unsqueeze(-2)
    if stored.kind.affine:
        ones = problem.metric.sum((-2, -1), keepdim=True).clamp_min(TINY).unsqueeze(-1)
        rest = curve - cross * cross / ones  # of the scale, once the shift follows
        step = torch.where(rest > 1e-6 * curve, (cross * level / ones - lean) / rest.clamp_min(TINY), 0.0)
        scales = stored.scale(scale + step, nudged=True)
        shifts = stored.shift(shift + (level + (scales - scale) * cross) / ones)
    else:
        scales = stored.scale(scale - lean / curve.clamp_min(TINY), nudged=True)
        shifts = shift.expand_as(scales)
    return Pair(codes.unsqueeze(-2).expand(*codes.shape[:-1], *scales.shape[-2:]), scales, shifts)


def _ranges(problem: Problem, stored: Stored) -> Pair:
    """FINALISTS among RATIOS of the range of ``problem.here``, by plain rounding."""
    kind, aim = stored.kind, problem.here.unsqueeze(-2)
    low, high = aim.amin(-3, keepdim=True), aim.amax(-3, keepdim=True)
    ratios = torch.tensor(RATIOS, device=aim.device).view(-1, 1)
    if kind.affine:
        low = low.clamp_max(0)
        scale = stored.scale((high.clamp_min(0) - low) * ratios / kind.top)
        shift = stored.shift(low * -ratios)
    else:
        widest = torch.where(-low > high, -low, -high)  # the longer side has one level more
        scale = stored.scale(widest * ratios / -kind.low)
        shift = torch.zeros_like(scale)
    codes = ((aim + shift) / torch.where(scale == 0, TINY, scale)).round_().clamp_(kind.low, kind.low + kind.top)
    pairs = Pair(codes, scale, shift)
    return pairs.pick(_loss(problem, pairs).argsort(-2)[..., :FINALISTS, :])


def _loss(problem: Problem, pairs: Pair) -> Tensor:
    """``[1, n, out]``."""
    gap = pairs.weights() - problem.here.unsqueeze(-2)
    product = (problem.metric @ gap.flatten(-2)).view_as(gap)
    return (product.add_(problem.slope.unsqueeze(-2), alpha=2) * gap).sum(-3, keepdim=True)


def _best(problem: Problem, kind: Kind, starts: Pair) -> Pair:
    """Every start with codes by coordinate descent, all in one call; the best by row."""
    metric, scales = problem.metric, starts.scale.flatten(-2)
    flat = (problem.slope - metric @ problem.here).unsqueeze(-2)
    linear = flat - metric.sum(-1, keepdim=True).unsqueeze(-1) * starts.shift
    group = Group(starts.codes.flatten(-2), scales, torch.full_like(scales, -kind.low))
    better = descent.improve(linear.flatten(-2), metric, kind.levels, group, scales=False).levels
    found = Pair(better.view_as(starts.codes), starts.scale, starts.shift)
    return found.pick(_loss(problem, found).argmin(-2, keepdim=True))
