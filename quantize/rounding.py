"""GPTQ: round a column, let the columns after it absorb the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323,
algorithm 1, with the grid of each group fitted when the group is reached. Rounding columns by descending diag(H)
(act-order) is in the authors' own repository, IST-DASLab/gptq; here with static groups: every grid is fitted before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.quantize import grid as grids
from qtool.quantize.grid import Grid, GridSpec
from qtool.quantize.precision import subtract_product

MAX_DAMP = 1e3
BLOCK = 128  # columns whose errors are spread over the columns behind them in one product


@dataclass(frozen=True)
class Factor:
    """``upper``: U with ``UᵀU = (H + damp * mean(diag H) * I)^-1``, float32 ``[in, in]``; ``damp``: what it took,
    float64 ``[]`` in host memory. Of a stack: each ``[E, …]``.

    order: int64 ``[in]``, the columns in the order in which they are rounded; rows and columns of H are taken in that
    order. None: as they lie.
    """

    upper: Tensor
    damp: Tensor
    order: Tensor | None = None

    def __getitem__(self, number: int) -> Factor:
        """One of a stack."""
        order = None if self.order is None else self.order[number]
        return Factor(self.upper[number], self.damp[number], order)


@dataclass(frozen=True)
class Rounded:
    """Codes (float integers ``[out, in]``) and their grid."""

    codes: Tensor
    grid: Grid


def activation_order(gram: Tensor) -> Tensor:
    """Columns by descending ``diag(G)``: int64 ``[in]``, ``[E, in]`` of a stack."""
    return gram.diagonal(dim1=-2, dim2=-1).argsort(descending=True, stable=True)


def factorize(gram: Tensor, damp: float, order: Tensor | None = None) -> Factor:
    """The upper Cholesky factor of the inverse of the damped Gram matrix; ``damp`` grows tenfold until it exists.

    Reversing rows and columns turns the lower factor of H into the upper factor of H^-1 with one triangular inverse:
    J H J = L Lᵀ  =>  U = J L^-1 J. A stack is done one by one, so that one matrix's copies are alive at a time.
    """
    if gram.ndim == 3:
        return _factorize_stack(gram, damp, order)
    mean = gram.diagonal().mean()
    if not bool(mean.isfinite()):
        raise ArithmeticError("the Gram matrix holds NaN or Inf")
    if not bool(mean > 0):  # inputs that are all zero: any rounding is as good
        return _factor(torch.eye(gram.shape[0], device=gram.device), damp, order)
    if order is not None:
        gram = gram[order][:, order]
    while True:
        damped = gram.flip(0, 1)
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not bool(failed):
            break
        damp = max(damp, 1e-4) * 10
        if damp > MAX_DAMP:
            raise ArithmeticError("the Gram matrix stays singular at any damping")
    eye = torch.eye(gram.shape[0], device=gram.device)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    del lower, eye  # each as large as the Gram matrix
    return _factor(inverse.flip(0, 1), damp, order)


def _factor(upper: Tensor, damp: float, order: Tensor | None) -> Factor:
    return Factor(upper, torch.tensor(damp, dtype=torch.float64), order)


def _factorize_stack(grams: Tensor, damp: float, orders: Tensor | None) -> Factor:
    uppers, damps = torch.empty_like(grams), []
    for number, gram in enumerate(grams):
        factor = factorize(gram, damp, None if orders is None else orders[number])
        uppers[number] = factor.upper
        damps.append(factor.damp)
    return Factor(uppers, torch.stack(damps), orders)


@contextmanager
def damped(gram: Tensor, factor: Factor) -> Iterator[None]:
    """While open, ``gram`` is damped as ``factor`` is."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    before = diagonal.clone()
    diagonal.add_((factor.damp.to(before) * before.mean(-1)).unsqueeze(-1))
    try:
        yield
    finally:
        diagonal.copy_(before)


def gptq(weight: Tensor, factor: Factor, spec: GridSpec, clip: bool = True, gram: Tensor | None = None) -> Rounded:
    """Round ``weight [out, in]`` (float32, overwritten) column by column with error compensation.

    With ``clip`` each group's grid minimizes the error that the columns after it cannot absorb, else it is min/max.
    Where ``factor`` has an order of its own, a group's columns lie apart in it: its grid is fitted before all
    rounding, with ``clip`` to the least error that the group's block of ``gram`` (in the order of the weight) sees.
    Of a stack, ``[E, …]`` each, one after the other.
    """
    if weight.ndim == 3:
        parts = [
            gptq(one, factor[number], spec, clip, None if gram is None else gram[number])
            for number, one in enumerate(weight)
        ]
        scale, zero = (torch.stack([getattr(part.grid, name) for part in parts]) for name in ("scale", "zero"))
        return Rounded(torch.stack([part.codes for part in parts]), Grid(scale, zero))
    columns = weight.shape[1]
    spec = spec.for_columns(columns)
    if factor.order is not None:
        blocks = grids.diagonal_blocks(gram, spec.group_size) if clip and gram is not None else None
        grid = grids.fit_minmax(weight, spec) if blocks is None else grids.fit_clipped(weight, blocks, spec)
        return _round_in_order(weight, factor, factor.order, grid, spec)
    codes = torch.empty_like(weight)
    scales, zeros = [], []
    metrics = residual_metric(grids.diagonal_blocks(factor.upper, spec.group_size)) if clip else None
    for number, start in enumerate(range(0, columns, spec.group_size)):
        end = start + spec.group_size
        group = weight[:, start:end]
        if metrics is not None:
            grid = grids.fit_clipped(group, metrics[number : number + 1], spec)
        else:
            grid = grids.fit_minmax(group, spec)
        scales.append(grid.scale)
        zeros.append(grid.zero)
        _round_columns(weight, codes, factor.upper, (start, end), Grid(grid.scale.t(), grid.zero.t()), spec.levels)
    return Rounded(codes, Grid(torch.cat(scales, 1), torch.cat(zeros, 1)))


def _round_in_order(weight: Tensor, factor: Factor, order: Tensor, grid: Grid, spec: GridSpec) -> Rounded:
    """Act-order with static groups: grids of neighbouring columns, rounded as ``order`` says."""
    group = order // spec.group_size
    codes = torch.empty_like(weight)
    by_column = Grid(grid.scale.t()[group], grid.zero.t()[group])
    _round_columns(weight[:, order], codes, factor.upper, (0, weight.shape[1]), by_column, spec.levels)
    return Rounded(codes[:, order.argsort()], grid)


def _round_columns(
    weight: Tensor, codes: Tensor, upper: Tensor, span: tuple[int, int], grid: Grid, levels: int
) -> None:
    """Round the columns of ``span`` into ``codes`` and spread their errors over all columns behind. The grid is
    transposed: ``[1, out]`` for all columns of the span, or ``[span, out]``, one for each."""
    start, end = span
    single = grid.scale.shape[0] == 1
    for first in range(start, end, BLOCK):
        last = min(first + BLOCK, end)
        rows = slice(0, 1) if single else slice(first - start, last - start)
        block_codes, errors = _round_block(
            weight[:, first:last].t().contiguous(), upper[first:last, first:last],
            Grid(grid.scale[rows], grid.zero[rows]), levels,
        )  # fmt: skip
        codes[:, first:last] = block_codes.t()
        subtract_product(weight[:, last:], errors.t(), upper[first:last, last:])


def residual_metric(upper: Tensor) -> Tensor:
    """``M [..., g, g]`` such that ``e M eᵀ`` is what an error e of a group costs after the columns behind it did their
    best: the Schur complement of H on the group, ``U_gg^-1 U_gg^-T``."""
    inverse = invert_upper(upper)
    return inverse @ inverse.mT


def invert_upper(upper: Tensor) -> Tensor:
    """Of upper triangular matrices ``[..., g, g]``."""
    eye = torch.eye(upper.shape[-1], device=upper.device).expand_as(upper)
    inverse: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return inverse


def _round_block(block: Tensor, upper: Tensor, grid: Grid, levels: int) -> tuple[Tensor, Tensor]:
    """A block of columns, transposed ``[n, out]`` so that a column is contiguous; grid ``[1, out]`` or ``[n, out]``.
    Returns codes and scaled errors ``[n, out]``."""
    if block.is_cuda:
        from qtool.quantize.kernels import round_block

        return round_block(block, upper, grid.scale, grid.zero, levels)
    scales, zeros = grid.scale.contiguous().expand_as(block), grid.zero.contiguous().expand_as(block)
    inverse_scales = (1.0 / grid.scale).contiguous().expand_as(block)
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    diagonal = upper.diagonal().tolist()
    for i, pivot in enumerate(diagonal):
        column, zero = block[i], zeros[i]
        code = torch.mul(column, inverse_scales[i], out=codes[i]).round_().add_(zero).clamp_(0, levels)
        error = torch.sub(code, zero, out=errors[i]).mul_(scales[i]).sub_(column).mul_(-1.0 / pivot)
        block[i + 1 :].addr_(upper[i, i + 1 :], error, alpha=-1)
    return codes, errors


def propagated_target(weight: Tensor, drift: Tensor, factor: Factor, alpha: float) -> Tensor:
    """``W + alpha * D (G + lambda I)^-1`` with ``drift`` D = W (C - G): what to aim at so that the quantized
    prefix's inputs X̂ reproduce the source's outputs W X. G = X̂ᵀX̂, C = XᵀX̂; the factor holds the damped inverse
    as UᵀU. Of pieces of one matrix ``[pieces, out, in]`` each, with one factor."""
    upper = factor.upper
    if factor.order is not None:
        upper = upper.gather(-1, factor.order.argsort(-1).unsqueeze(-2).expand_as(upper))
    if weight.ndim == 3 and upper.ndim == 2:  # pieces: a product for each
        parts = zip(weight, drift, strict=True)
        return torch.stack([torch.addmm(one, own @ upper.t(), upper, alpha=alpha) for one, own in parts])
    if weight.ndim == 3:
        return torch.baddbmm(weight, drift @ upper.mT, upper, alpha=alpha)
    return torch.addmm(weight, drift @ upper.t(), upper, alpha=alpha)
