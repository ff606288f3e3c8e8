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

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from qtool.quantize.grid import Grid, GridSpec, diagonal_blocks, stored
from qtool.quantize.precision import add_outer, add_product, subtract_product, tensor_float32
from qtool.quantize.rounding import Factor, invert_upper

RATIOS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)  # of the scale that covers the whole range
FINALISTS = 2  # of these, the best by plain rounding are worked out
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
    weight, size = target.mT.clone(memory_format=torch.contiguous_format), levels.group_size
    inverses = invert_upper(diagonal_blocks(factor.upper, size))
    chosen = _Columns.empty(weight, size)
    for number, start in enumerate(range(0, weight.shape[-2], size)):
        stop, inverse = start + size, inverses[number]
        aim = weight[..., start:stop, :].contiguous()
        metric = inverse @ inverse.mT
        group = choose(aim, metric, levels)
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
    found, wanted = _Columns.of(chosen), target.mT.contiguous()
    error = chosen.weights().mT.contiguous().sub_(wanted)
    for _ in range(sweeps):
        for number, start in enumerate(range(0, wanted.shape[-2], size)):
            columns, group = slice(start, start + size), start // levels.group_size
            before, block = found.group(group, columns), blocks[number].contiguous()
            with tensor_float32():
                linear = gram[..., columns, :] @ error
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


@dataclass(frozen=True)
class Group:
    """``levels [g, out]``, ``scale`` and ``zero`` ``[1, out]``."""

    levels: Tensor
    scale: Tensor
    zero: Tensor

    def weights(self) -> Tensor:
        """What a reader gets, ``[g, out]``."""
        return self.levels * self.scale


def choose(aim: Tensor, metric: Tensor, levels: Levels) -> Group:
    """Scales, zeros and levels that lose least of ``e metric eᵀ`` for e = weights - aim ``[g, out]``: of RATIOS of the
    covering scale, the finalists by plain rounding, improved, row by row."""
    linear = (metric @ aim).neg_()
    kernels, own = _kernels(aim), (levels.table or (), levels.top, levels.rule, levels.dtype)
    if kernels is not None:
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
    if kernels is None:
        return _improve(linear, metric, levels, current, scales)
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
    if levels.table is None:
        return torch.minimum(torch.maximum(ratio.round_(), -zero), levels.top - zero)
    table = torch.tensor(levels.table, device=ratio.device)
    return table[torch.bucketize(ratio, (table[1:] + table[:-1]) / 2)]


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
    own = 1 / metric.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    for column in range(code.shape[-2]):
        one, behind = slice(column, column + 1), slice(column + 1, None)
        old = code[..., one, :]
        new = _level(old - gradient[..., one, :] * (over * own[..., one, :]), zero, levels)
        add_outer(gradient[..., behind, :], metric[..., behind, one], (new - old) * scale)
        code[..., one, :] = new
    return Group(code, scale, current.zero)


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


@dataclass(frozen=True)
class _Columns:
    """A Chosen with a column of weights in a row: ``levels [in, out]``, ``scale``, ``zero [in / group_size, out]``."""

    levels: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, chosen: Chosen) -> _Columns:
        parts = (chosen.levels, chosen.scale, chosen.zero)
        return cls(*(tensor.mT.clone(memory_format=torch.contiguous_format) for tensor in parts))

    @classmethod
    def empty(cls, weight: Tensor, size: int) -> _Columns:
        *problems, columns, out = weight.shape
        return cls(torch.empty_like(weight), *weight.new_empty(2, *problems, columns // size, out))

    def group(self, number: int, columns: slice) -> Group:
        one = slice(number, number + 1)
        return Group(self.levels[..., columns, :], self.scale[..., one, :], self.zero[..., one, :])

    def put(self, number: int, columns: slice, group: Group) -> None:
        self.levels[..., columns, :] = group.levels
        self.scale[..., number : number + 1, :] = group.scale
        self.zero[..., number : number + 1, :] = group.zero

    def rows(self) -> Chosen:
        return Chosen(*(tensor.mT.contiguous() for tensor in (self.levels, self.scale, self.zero)))
