"""Scales and codes that lose least: each group's chosen together, the groups of a matrix in turn, until no step helps.

For inputs with Gram matrix H, a matrix W̃ in place of the target W loses tr((W̃ - W) H (W̃ - W)ᵀ). With all other groups
held, the loss of one group is a quadratic in its weights alone, so a step that lowers it lowers the whole. Steps:

* scale: the best scale for given codes, in closed form (least squares), as the container will store it;
* code: each column's best level with all others held, one column after the other (cyclic coordinate descent).

`begin` goes through the groups once, left to right, as GPTQ does: the columns behind take up what a group loses, and
the group is chosen under what they cannot take up. `descend` then comes back to every group with all others known.
GPTQ, arXiv 2210.17323; coordinate descent after it, as in CDQuant, arXiv 2406.17542; here with the scales.

Every function takes one problem or a stack of E with a leading axis on all tensors: experts, each with its own metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from qtool.quantize.grid import Grid, GridSpec, diagonal_blocks, stored
from qtool.quantize.precision import add_product, subtract_product, tensor_float32
from qtool.quantize.rounding import Factor, invert_upper

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
    weight, size = target.mT.contiguous(), levels.group_size
    inverses = invert_upper(diagonal_blocks(factor.upper, size))
    chosen = _Columns.empty(weight, size)
    for number, start in enumerate(range(0, weight.shape[-2], size)):
        stop, inverse = start + size, inverses[number]
        aim = weight[..., start:stop, :]
        metric = inverse @ inverse.mT
        group = choose(Problem((metric @ aim).neg_(), aim, metric), levels, RATIOS)
        chosen.put(number, slice(start, stop), group)
        if stop < weight.shape[-2]:
            spread = inverse.mT @ group.weights().neg_().add_(aim)
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
    inverses = torch.linalg.inv(blocks) if scales else blocks
    found, wanted = _Columns.of(chosen), target.mT.contiguous()
    error = chosen.weights().mT.contiguous().sub_(wanted)
    for sweep in range(sweeps):
        for number, start in enumerate(range(0, wanted.shape[-2], size)):
            columns, group = slice(start, start + size), start // levels.group_size
            before = found.group(group, columns)
            with tensor_float32():
                linear = gram[..., columns, :] @ error
            add_product(linear, blocks[number], before.weights(), -1)
            aim = (inverses[number] @ linear).neg_() if scales and sweep == 0 else None
            ratios = () if aim is None else RATIOS
            after = choose(Problem(linear, aim, blocks[number]), levels, ratios, before, scales)
            found.put(group, columns, after)
            torch.sub(after.weights(), wanted[..., columns, :], out=error[..., columns, :])
    return found.rows()


def workspace(out: int, columns: int) -> int:
    """Float32 numbers that `descend` takes at most, with what it is given: two targets, levels before and after, the
    error; a block's columns in and out of the kernels, with FINALISTS beside the levels that are there."""
    return 5 * out * columns + (4 + 4 * (FINALISTS + 1)) * out * BLOCK


def _block(group_size: int) -> int:
    """The columns of a visit: a group's, or the most below BLOCK that a larger group divides by."""
    return group_size if group_size <= BLOCK else max(n for n in range(1, BLOCK + 1) if group_size % n == 0)


@dataclass(frozen=True)
class Problem:
    """The loss of a group's weights w, a column of them in a row ``[g, out]``: ``w (metric w + 2 linear)`` and a
    constant. ``metric [g, g]``; ``aim``: its minimum, from which candidates are made (None: there are none)."""

    linear: Tensor
    aim: Tensor | None
    metric: Tensor


@dataclass(frozen=True)
class Group:
    """``levels [g, out]``, ``scale`` and ``zero`` ``[1, out]``."""

    levels: Tensor
    scale: Tensor
    zero: Tensor

    def weights(self) -> Tensor:
        """What a reader gets, ``[g, out]``."""
        return self.levels * self.scale


def choose(
    problem: Problem, levels: Levels, ratios: Sequence[float], current: Group | None = None, scales: bool = True
) -> Group:
    """The best found, row by row: ``current`` and the finalists among ``ratios`` of the covering scale, each improved
    by PASSES over scale (if ``scales``) and codes."""
    scale, zero = _finalists(problem, levels, ratios)
    if current is not None:
        scale, zero = (
            torch.cat([own.movedim(-2, 0), others]) for own, others in ((current.scale, scale), (current.zero, zero))
        )
    code, scale, losses = _improve(problem, levels, None if current is None else current.levels, scale, zero, scales)
    if len(code) == 1:
        return Group(code[0], scale[0].unsqueeze(-2), zero[0].unsqueeze(-2))
    best = losses.argmin(0, keepdim=True)
    level = code.gather(0, best.unsqueeze(-2).expand(1, *code.shape[1:]))[0]
    return Group(level, scale.gather(0, best)[0].unsqueeze(-2), zero.gather(0, best)[0].unsqueeze(-2))


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
    if levels.table is None:
        return torch.minimum(torch.maximum(ratio.round_(), -zero), levels.top - zero)
    table = torch.tensor(levels.table, device=ratio.device)
    return table[torch.bucketize(ratio, (table[1:] + table[:-1]) / 2)]


def _finalists(problem: Problem, levels: Levels, ratios: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Scales and zeros ``[finalists, out]`` of those that lose least by plain rounding."""
    if problem.aim is None or not ratios:
        nothing = problem.linear.new_empty(0, *problem.linear[..., 0, :].shape)
        return nothing, nothing
    kernels = _kernels(problem)
    if kernels is not None:
        table = levels.table or ()
        losses, scale, zero = kernels.rank(
            problem.aim, problem.metric, ratios, table, levels.top, levels.rule, levels.dtype
        )
    else:
        grids = [covering(problem.aim, levels, ratio) for ratio in ratios]
        errors = (nearest(problem.aim, *grid, levels).mul_(grid[0]).sub_(problem.aim) for grid in grids)
        losses = torch.stack([_loss(problem.metric, error) for error in errors])
        scale, zero = (torch.stack([grid[part].squeeze(-2) for grid in grids]) for part in (0, 1))
    leaders = []
    for _ in range(min(FINALISTS, len(ratios))):
        leaders.append(losses.argmin(0, keepdim=True))
        losses.scatter_(0, leaders[-1], torch.inf)
    order = torch.cat(leaders)
    return scale.gather(0, order), zero.gather(0, order)


def _loss(metric: Tensor, error: Tensor) -> Tensor:
    return (metric @ error).mul_(error).sum(-2)


def _improve(
    problem: Problem, levels: Levels, begun: Tensor | None, scale: Tensor, zero: Tensor, scales: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(levels ``[starts, g, out]``, scales ``[starts, out]``, losses ``[starts, out]``) after PASSES over every start:
    ``begun``, if any, and what is nearest to the aim on each of the grids left. No losses where there is one start."""
    kernels = _kernels(problem)
    if kernels is not None:
        table = levels.table or ()
        found: tuple[Tensor, Tensor, Tensor] = kernels.improve(
            problem.linear, problem.aim, problem.metric, begun, scale, zero, table, levels.top, levels.rule,
            levels.dtype, scales, PASSES,
        )  # fmt: skip
        return found
    starts, metric = scale.shape[0], problem.metric
    codes = [] if begun is None else [begun]
    for number in range(len(codes), starts):
        assert problem.aim is not None
        codes.append(nearest(problem.aim, scale[number].unsqueeze(-2), zero[number].unsqueeze(-2), levels))
    code, linear = torch.cat(codes, -1), torch.cat([problem.linear] * starts, -1)  # a start beside the other
    flat, zeros = (part.movedim(0, -2).flatten(-2).unsqueeze(-2) for part in (scale, zero))
    own = 1 / metric.diagonal(dim1=-2, dim2=-1)
    for _ in range(PASSES):
        product = metric @ code
        if scales:
            flat = _best_scale(code, flat, linear, product, levels.dtype)
        gradient, over = torch.addcmul(linear, product, flat), 1 / torch.where(flat == 0, TINY, flat)
        for column, inverse in enumerate(own.unsqueeze(-1).unsqueeze(-1).unbind(-3)):
            here = slice(column, column + 1)
            old = code[..., here, :]
            new = _level(old - gradient[..., here, :] * (over * inverse), zeros, levels)
            add_product(gradient[..., column + 1 :, :], metric[..., column + 1 :, here], (new - old) * flat)
            code[..., here, :] = new
    if starts > 1:
        assert problem.aim is not None
        loss = _loss(metric, code * flat - torch.cat([problem.aim] * starts, -1))
    else:
        loss = flat.squeeze(-2)
    code, flat, loss = (part.unflatten(-1, (starts, -1)).movedim(-2, 0) for part in (code, flat.squeeze(-2), loss))
    return code, flat, loss


def _kernels(problem: Problem) -> ModuleType | None:
    """Their Triton twins, where these run."""
    if not problem.linear.is_cuda:
        return None
    from qtool.quantize import descent_kernels

    return descent_kernels if descent_kernels.fits(problem.metric.shape[-1]) else None


def _best_scale(code: Tensor, scale: Tensor, linear: Tensor, product: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale with the least loss for these levels, where storing it leaves a gain; ``product``: metric @ code."""
    curve = (code * product).sum(-2, keepdim=True)
    slope = (code * linear).sum(-2, keepdim=True) + scale * curve
    wished = scale - slope / curve.clamp_min(1e-30)
    step = (wished if dtype == torch.float32 else _stored(wished, dtype)) - scale
    helps = (2 * step * slope + step * step * curve < 0) & (wished * scale > 0) & (curve > 0)
    return scale + torch.where(helps, step, 0.0)


@dataclass(frozen=True)
class _Columns:
    """A Chosen with a column of weights in a row: ``levels [in, out]``, ``scale``, ``zero [in / group_size, out]``."""

    levels: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, chosen: Chosen) -> _Columns:
        return cls(
            *(
                tensor.mT.clone(memory_format=torch.contiguous_format)
                for tensor in (chosen.levels, chosen.scale, chosen.zero)
            )
        )

    @classmethod
    def empty(cls, weight: Tensor, size: int) -> _Columns:
        *problems, columns, out = weight.shape
        return cls(torch.empty_like(weight), *weight.new_empty(2, *problems, columns // size, out))

    def group(self, number: int, columns: slice) -> Group:
        one = slice(number, number + 1)
        return Group(*(t[..., part, :] for t, part in ((self.levels, columns), (self.scale, one), (self.zero, one))))

    def put(self, number: int, columns: slice, group: Group) -> None:
        self.levels[..., columns, :] = group.levels
        self.scale[..., number : number + 1, :] = group.scale
        self.zero[..., number : number + 1, :] = group.zero

    def rows(self) -> Chosen:
        return Chosen(*(tensor.mT.contiguous() for tensor in (self.levels, self.scale, self.zero)))
