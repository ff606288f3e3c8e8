"""GPTQ: round a column, let the columns after it absorb the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323,
algorithm 1, with the grid of each group fitted when the group is reached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.quantize import grid as grids
from qtool.quantize.grid import Grid, GridSpec

MAX_DAMP = 1e3


@dataclass(frozen=True)
class Factor:
    """``upper``: U with ``UᵀU = (H + damp * mean(diag H) * I)^-1``, float32 ``[in, in]``; ``damp``: what it took."""

    upper: Tensor
    damp: float


@dataclass(frozen=True)
class Rounded:
    """Codes (float integers ``[out, in]``) and their grid."""

    codes: Tensor
    grid: Grid


def factorize(gram: Tensor, damp: float) -> Factor:
    """The upper Cholesky factor of the inverse of the damped Gram matrix; ``damp`` grows tenfold until it exists.

    Reversing rows and columns turns the lower factor of H into the upper factor of H^-1 with one triangular inverse:
    J H J = L Lᵀ  =>  U = J L^-1 J.
    """
    mean = gram.diagonal().mean()
    if not bool(mean.isfinite()):
        raise ArithmeticError("the Gram matrix holds NaN or Inf")
    if not bool(mean > 0):  # inputs that are all zero: any rounding is as good
        return Factor(torch.eye(gram.shape[0], device=gram.device), damp)
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
    return Factor(inverse.flip(0, 1).contiguous(), damp)


def gptq(weight: Tensor, factor: Factor, spec: GridSpec, clip: bool = True) -> Rounded:
    """Round ``weight [out, in]`` (float32, overwritten) column by column with error compensation.

    With ``clip`` each group's grid minimizes the error that the columns after it cannot absorb, else it is min/max.
    """
    out, columns = weight.shape
    size = spec.group_size
    codes = torch.empty_like(weight)
    scales, zeros = [], []
    for start in range(0, columns, size):
        end = start + size
        upper = factor.upper[start:end, start:end]
        block = weight[:, start:end]
        if clip:
            grid = grids.fit_clipped(block, residual_metric(upper).unsqueeze(0), spec)
        else:
            grid = grids.fit_minmax(block, spec)
        scales.append(grid.scale)
        zeros.append(grid.zero)
        block_codes, errors = _round_block(block.t().contiguous(), upper, grid, spec)
        codes[:, start:end] = block_codes.t()
        weight[:, end:].addmm_(errors.t(), factor.upper[start:end, end:], alpha=-1)
    return Rounded(codes, Grid(torch.cat(scales, 1), torch.cat(zeros, 1)))


def residual_metric(upper: Tensor) -> Tensor:
    """``M [g, g]`` such that ``e M eᵀ`` is what an error e of this group costs after the columns behind it did their
    best: the Schur complement of H on the group, ``U_gg^-1 U_gg^-T``."""
    eye = torch.eye(upper.shape[0], device=upper.device)
    inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
    return inverse @ inverse.t()


def _round_block(block: Tensor, upper: Tensor, grid: Grid, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """One group, transposed ``[g, out]`` so that a column is contiguous. Returns codes and scaled errors ``[g, out]``."""
    if block.is_cuda:
        from qtool.quantize.kernels import round_block

        return round_block(block, upper, grid.scale, grid.zero, spec.levels)
    scale, zero = grid.scale[:, 0], grid.zero[:, 0]
    inverse_scale = 1.0 / scale
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    diagonal = upper.diagonal().tolist()
    for i, pivot in enumerate(diagonal):
        column = block[i]
        code = torch.mul(column, inverse_scale, out=codes[i]).round_().add_(zero).clamp_(0, spec.levels)
        error = torch.sub(code, zero, out=errors[i]).mul_(scale).sub_(column).mul_(-1.0 / pivot)
        block[i + 1 :].addr_(upper[i, i + 1 :], error, alpha=-1)
    return codes, errors


def propagated_target(weight: Tensor, drift: Tensor, factor: Factor, alpha: float) -> Tensor:
    """``W + alpha * D (G + lambda I)^-1`` with ``drift`` D = W (C - G): what to aim at so that the quantized prefix's inputs
    X̂ reproduce the source's outputs W X. G = X̂ᵀX̂, C = XᵀX̂; the factor holds the damped inverse as UᵀU."""
    return torch.addmm(weight, drift @ factor.upper.t(), factor.upper, alpha=alpha)
