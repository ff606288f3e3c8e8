"""Scales and codes that lose least: each group's chosen together, the groups of a matrix in turn, until no step helps.

For inputs with Gram matrix H, a matrix W̃ in place of the target W loses tr((W̃ - W) H (W̃ - W)ᵀ). With all other groups
held, the loss of one group is a quadratic in its weights alone, so a step that lowers it lowers the whole. Steps:

* scale: the best scale for given codes, in closed form (least squares), as the container will store it;
* code: each column's best level with all others held, one column after the other (cyclic coordinate descent).

`begin` goes through the groups once, left to right, as GPTQ does: the columns behind take up what a group loses, and
the group is chosen under what they cannot take up. `descend` then comes back to every group with all others known.
GPTQ, arXiv 2210.17323; coordinate descent after it, as in CDQuant, arXiv 2406.17542; here with the scales.

All functions take one problem or a stack of E, with a leading axis on every tensor: experts, each with its own metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.quantize.grid import Grid, GridSpec, diagonal_blocks, stored
from qtool.quantize.precision import subtract_product, tensor_float32
from qtool.quantize.rounding import Factor, residual_metric

RATIOS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)  # of the scale that covers the whole range
FINALISTS = 2  # of these, the best by plain rounding are worked out
PASSES = 2  # over a group's scale and codes, each time it is visited
SWEEPS = 3
TINY = 1e-30  # in place of a scale that was stored as zero
BLOCK = 128  # columns visited at once where a group is a whole row


@dataclass(frozen=True)
class Levels:
    """What codes may stand for: ``weight = scale * level``.

    ``table`` float32 ``[16]``, rising: the levels themselves, shared by all groups (NF4). None: the integers
    ``-zero .. top - zero``, where ``sym`` puts the zero in the middle and lets the scale have either sign if
    ``signed``, and otherwise each group has its own. ``dtype``: what a scale is stored as; float32 keeps it as it is.
    """

    top: int
    group_size: int
    dtype: torch.dtype
    sym: bool = False
    signed: bool = True
    table: tuple[float, ...] | None = None

    @property
    def rule(self) -> int:
        """How a scale is made of a range, as the kernel numbers it."""
        if self.table is not None:
            return 3
        return 2 if not self.sym else 0 if self.signed else 1

    @classmethod
    def of_grid(cls, spec: GridSpec, signed: bool = True) -> Levels:
        """Those of a uniform grid."""
        return cls(spec.levels, spec.group_size, spec.dtype, spec.sym, signed)


@dataclass(frozen=True)
class Chosen:
    """``levels`` float32 ``[out, in]``; ``scale`` and ``zero`` float32 ``[out, in / group_size]``."""

    levels: Tensor
    scale: Tensor
    zero: Tensor

    def weights(self) -> Tensor:
        """What a reader gets, float32 ``[out, in]``."""
        groups = self.levels.unflatten(-1, (self.scale.shape[-1], -1))
        return torch.flatten(groups * self.scale.unsqueeze(-1), -2)

    def codes(self) -> Tensor:
        """The integers of a uniform grid, 0 .. top."""
        groups = self.levels.unflatten(-1, (self.scale.shape[-1], -1))
        return torch.flatten(groups + self.zero.unsqueeze(-1), -2)

    @property
    def grid(self) -> Grid:
        return Grid(self.scale, self.zero)


def begin(target: Tensor, factor: Factor, levels: Levels) -> Chosen:
    """One pass from left to right: each group under the metric that the columns behind leave it, its loss spread over
    them. ``target`` float32 ``[out, in]``, unchanged; ``factor``: of the damped Gram matrix, in the columns' order."""
    weight, size = target.clone(), levels.group_size
    metrics = residual_metric(diagonal_blocks(factor.upper, size))
    chosen = Chosen(torch.empty_like(weight), *torch.empty(2, *_groups(weight, size), device=weight.device))
    for number, start in enumerate(range(0, weight.shape[-1], size)):
        stop = start + size
        aim = weight[..., start:stop].contiguous()
        group = choose(Problem(aim, torch.zeros_like(aim), aim, metrics[number]), levels, RATIOS)
        _put(chosen, number, slice(start, stop), group)
        if stop < weight.shape[-1]:
            upper = factor.upper[..., start:stop, :]
            error = aim - group.levels * group.scale
            spread = torch.linalg.solve_triangular(upper[..., start:stop], error, upper=True, left=False)
            subtract_product(weight[..., stop:], spread, upper[..., stop:])
    return chosen


def descend(
    target: Tensor, chosen: Chosen, gram: Tensor, levels: Levels, sweeps: int = SWEEPS, scales: bool = True
) -> Chosen:
    """Come back to each group ``sweeps`` times, all others held; never a higher loss than before. ``gram [in, in]``:
    symmetric and positive definite. ``scales`` False: scales stay, codes move."""
    size = _block(levels.group_size)
    scales = scales and size == levels.group_size
    blocks = diagonal_blocks(gram, size)
    inverses = torch.linalg.inv(blocks)
    chosen = Chosen(chosen.levels.clone(), chosen.scale.clone(), chosen.zero.clone())
    error = chosen.weights().sub_(target)
    for sweep in range(sweeps):
        for number, start in enumerate(range(0, target.shape[-1], size)):
            columns, group = slice(start, start + size), start // levels.group_size
            with tensor_float32():
                slope = error @ gram[..., columns]
            before = Group(chosen.levels[..., columns].contiguous(), *_column(chosen, group))
            here = before.levels * before.scale
            problem = Problem(here, slope, here - slope @ inverses[number], blocks[number])
            after = choose(problem, levels, RATIOS if scales and sweep == 0 else (), before, scales)
            _put(chosen, group, columns, after)
            torch.sub(after.levels * after.scale, target[..., columns], out=error[..., columns])
    return chosen


def workspace(out: int, columns: int) -> int:
    """Float32 numbers that `descend` takes at most, with what it is given: two targets, levels before and after, the
    error; a block's columns in and out of the kernel."""
    return 5 * out * columns + 12 * out * BLOCK


def _block(group_size: int) -> int:
    """The columns of a visit: a group's, or the most below BLOCK that a larger group divides by."""
    return group_size if group_size <= BLOCK else max(n for n in range(1, BLOCK + 1) if group_size % n == 0)


@dataclass(frozen=True)
class Problem:
    """A group's loss of weights w ``[out, g]``: with e = w - here, ``e (2 slope + e metric)ᵀ``, so 0 at ``here``.
    ``aim``: weights near the unconstrained optimum, from which candidates are made; ``metric [g, g]``."""

    here: Tensor
    slope: Tensor
    aim: Tensor
    metric: Tensor


@dataclass(frozen=True)
class Group:
    """``levels [out, g]``, ``scale`` and ``zero`` ``[out, 1]``."""

    levels: Tensor
    scale: Tensor
    zero: Tensor


def choose(
    problem: Problem, levels: Levels, ratios: Sequence[float], current: Group | None = None, scales: bool = True
) -> Group:
    """The best found, row by row: ``current`` and the finalists among ``ratios`` of the covering scale, each improved
    by PASSES over scale (if ``scales``) and codes."""
    if problem.aim.is_cuda:
        from qtool.quantize import descent_kernels

        if descent_kernels.fits(problem.aim.shape[-1]):
            parts = (problem.here, problem.slope, problem.aim, problem.metric)
            begun = None if current is None else (current.levels, current.scale, current.zero)
            return Group(*descent_kernels.choose(
                parts, ratios, begun, levels.table or (), levels.top, levels.rule, levels.dtype, scales, FINALISTS,
                PASSES,
            ))  # fmt: skip
    if problem.aim.ndim == 3:
        return _choose_stack(problem, levels, ratios, current, scales)
    here, slope, aim = (tensor.t().contiguous() for tensor in (problem.here, problem.slope, problem.aim))
    p = _Columns(here, slope, aim, problem.metric)
    starts = [] if current is None else [(current.levels.t().contiguous(), current.scale.t(), current.zero.t())]
    starts += _finalists(p, levels, ratios)
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for start in starts:
        found = _improve(p, levels, *start, scales)
        if best is None:
            best = found
        else:
            better = found[3] < best[3]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]  # four tensors, as before
    assert best is not None
    return Group(best[0].t(), best[1].t(), best[2].t())


def _choose_stack(
    problem: Problem, levels: Levels, ratios: Sequence[float], current: Group | None, scales: bool
) -> Group:
    """`choose` of one problem after the other."""
    parts = (problem.here, problem.slope, problem.aim, problem.metric)
    starts: list[Group | None] = [None] * len(problem.aim)
    if current is not None:
        starts = [Group(*start) for start in zip(current.levels, current.scale, current.zero, strict=True)]
    groups = [choose(Problem(*one), levels, ratios, start, scales) for *one, start in zip(*parts, starts, strict=True)]
    return Group(*(torch.stack([getattr(group, name) for group in groups]) for name in ("levels", "scale", "zero")))


@dataclass(frozen=True)
class _Columns:
    """A Problem with a column of weights in a row, ``[g, out]``: its steps take a column at a time."""

    here: Tensor
    slope: Tensor
    aim: Tensor
    metric: Tensor

    def loss(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(loss ``[1, out]``, its half gradient ``[g, out]``)."""
        error = weights - self.here
        gradient = torch.addmm(self.slope, self.metric, error)
        return ((gradient + self.slope) * error).sum(0, keepdim=True), gradient


def covering(aim: Tensor, levels: Levels, ratio: float) -> tuple[Tensor, Tensor]:
    """Scale and zero ``[1, out]`` of ``ratio`` times the range of ``aim [g, out]``, as they will be stored."""
    low, high = aim.amin(0, keepdim=True), aim.amax(0, keepdim=True)
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
    ratio = weights / torch.where(scale == 0, TINY, scale)
    if levels.table is None:
        return torch.minimum(torch.maximum(ratio.round_(), -zero), levels.top - zero)
    table = torch.tensor(levels.table, device=weights.device)
    return table[torch.bucketize(ratio, (table[1:] + table[:-1]) / 2)]


def _finalists(p: _Columns, levels: Levels, ratios: Sequence[float]) -> list[tuple[Tensor, Tensor, Tensor]]:
    if not ratios:
        return []
    grids = [covering(p.aim, levels, ratio) for ratio in ratios]
    losses = [p.loss(nearest(p.aim, *grid, levels).mul_(grid[0]))[0] for grid in grids]
    scales, zeros = (torch.cat([grid[part] for grid in grids]) for part in (0, 1))
    order = torch.cat(losses).argsort(0)[:FINALISTS]
    starts = [(scales.gather(0, rank), zeros.gather(0, rank)) for rank in order.split(1)]
    return [(nearest(p.aim, scale, zero, levels), scale, zero) for scale, zero in starts]


def _improve(
    p: _Columns, levels: Levels, code: Tensor, scale: Tensor, zero: Tensor, scales: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(levels ``[g, out]``, scale, zero, loss ``[1, out]``) after PASSES."""
    code, diagonal = code.clone(), p.metric.diagonal().tolist()
    gradient = p.loss(code * scale)[1]
    for _ in range(PASSES):
        if scales:
            scale = _best_scale(code, scale, gradient, p.metric, levels.dtype)
        for column, own in enumerate(diagonal):
            wished = code[column] * scale[0] - gradient[column] / own
            new = nearest(wished, scale[0], zero[0], levels)
            gradient.addr_(p.metric[column], (new - code[column]) * scale[0])
            code[column] = new
    return code, scale, zero, p.loss(code * scale)[0]


def _best_scale(code: Tensor, scale: Tensor, gradient: Tensor, metric: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale with the least loss for these levels, where storing it leaves a gain; ``gradient`` moves with it."""
    product = metric @ code
    slope, curve = (code * gradient).sum(0, keepdim=True), (code * product).sum(0, keepdim=True)
    wished = scale - slope / curve.clamp_min(1e-30)
    step = (wished if dtype == torch.float32 else _stored(wished, dtype)) - scale
    helps = (2 * step * slope + step * step * curve < 0) & (wished * scale > 0) & (curve > 0)
    step = torch.where(helps, step, 0.0)
    gradient.addcmul_(product, step)
    return scale + step


def _groups(weight: Tensor, size: int) -> tuple[int, ...]:
    return *weight.shape[:-1], weight.shape[-1] // size


def _column(chosen: Chosen, number: int) -> tuple[Tensor, Tensor]:
    return chosen.scale[..., number : number + 1].contiguous(), chosen.zero[..., number : number + 1].contiguous()


def _put(chosen: Chosen, number: int, columns: slice, group: Group) -> None:
    chosen.levels[..., columns] = group.levels
    chosen.scale[..., number : number + 1] = group.scale
    chosen.zero[..., number : number + 1] = group.zero
