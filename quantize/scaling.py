"""AWQ's scale search on Gram matrices: no forward is repeated for a grid point.

Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv 2306.00978. For inputs X ``[tokens, in]`` with G = XᵀX
the search loss ``|(W - Ŵ) Xᵀ|² = tr((W - Ŵ) G (W - Ŵ)ᵀ)`` needs G alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.quantize import grid as grids
from qtool.quantize.grid import GridSpec
from qtool.quantize.precision import bfloat16_products, float32_product, tensor_float32

POINTS = 20
PREVIEW_ROWS = 4  # every fourth row ranks the candidates
FINALISTS = 4  # the best few are then judged on all rows
SEARCHED = 5  # copies of the weights at most while scales are searched: theirs, stacked, errors, two of products
LOSS_COLUMNS = 4096  # of a Gram matrix at a time, so that temporaries stay small


@dataclass(frozen=True)
class ScaleSearch:
    """``scale [in]`` or None when no candidate beat leaving the weights alone; losses as fractions
    of ``tr(W G Wᵀ)``."""

    scale: Tensor | None
    loss: float
    loss_unscaled: float


def output_error(error: Tensor, gram: Tensor) -> Tensor:
    """``tr(E G Eᵀ)``, a scalar: the squared output error of a weight error ``[out, in]``, summed over all tokens."""
    if not error.is_cuda:
        return torch.dot((error @ gram).flatten(), error.flatten())
    step = LOSS_COLUMNS
    parts = [
        (float32_product(error, gram[:, start : start + step]) * error[:, start : start + step]).sum()
        for start in range(0, gram.shape[1], step)
    ]
    return torch.stack(parts).sum()


def candidate_scales(mean_abs: Tensor, weights: Sequence[Tensor], spec: GridSpec) -> Tensor:
    """``[2 * POINTS, in]``: activation-only ``x^a`` and duo ``x^a / w^(1 - a)``, a = 0, 1/20 … 19/20.

    w: mean over the rows of |w| relative to the largest of its group. Each row is centred: ``sqrt(max * min) = 1``.
    """
    relative = [
        (w.abs().unflatten(1, (-1, spec.group_size)) / _group_max(w, spec.group_size)).flatten(1).mean(0)
        for w in weights
    ]
    rows = torch.tensor([float(w.shape[0]) for w in weights], device=mean_abs.device)
    w_mean = (torch.stack(relative) * rows.unsqueeze(1)).sum(0) / rows.sum()
    x = mean_abs.clamp_min(1e-8).unsqueeze(0)
    ratio = (torch.arange(POINTS, device=mean_abs.device) / POINTS).unsqueeze(1)
    activation = x.pow(ratio)
    duo = activation / (w_mean.unsqueeze(0).pow(1 - ratio) + 1e-4)
    scales = torch.cat([activation, duo]).clamp_min_(1e-4)
    return scales / (scales.amax(1, keepdim=True) * scales.amin(1, keepdim=True)).sqrt()


def search_scale(
    weights: Sequence[Tensor], gram: Tensor, mean_abs: Tensor, spec: GridSpec, tie: Tensor | None = None
) -> ScaleSearch:
    """The per-input scale that loses least when ``weights`` (each ``[out_i, in]`` float32) are rounded to nearest.

    ``tie [in]`` (int64): columns with the same number must share one scale (query heads fed by one value head).
    """
    stacked = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    if tie is not None:
        mean_abs = _pool(mean_abs, tie)
    candidates = candidate_scales(mean_abs, weights, spec)
    if tie is not None:
        candidates = torch.stack([_pool(c, tie) for c in candidates])
    loss = _kernel_loss if stacked.is_cuda and spec.group_size <= grids.KERNEL_GROUP else _plain_loss
    with tensor_float32(), bfloat16_products() if not stacked.is_cuda else nullcontext():  # enough to rank
        ranks = torch.stack(loss(stacked[::PREVIEW_ROWS], gram, list(candidates), spec)).argsort()
    finalists = candidates[ranks[:FINALISTS]]
    with tensor_float32():
        losses = torch.stack(loss(stacked, gram, [torch.ones_like(mean_abs), *finalists], spec))
        total = output_error(stacked, gram).clamp_min(1e-30)
    relative = (losses / total).tolist()  # the one wait for the device
    best = min(range(len(relative)), key=relative.__getitem__)
    scale = None if best == 0 else finalists[best - 1]
    return ScaleSearch(scale, relative[best], relative[0])


def _kernel_loss(weight: Tensor, gram: Tensor, scales: Sequence[Tensor], spec: GridSpec) -> list[Tensor]:
    """Output errors of ``Q(W s)/s``, round to nearest on the min/max grid, for each scale ``[in]``."""
    from qtool.quantize.kernels import scaled_error

    weight, half = weight.contiguous(), spec.dtype == torch.float16
    return [
        output_error(scaled_error(weight, scale, spec.group_size, spec.levels, spec.sym, half), gram)
        for scale in scales
    ]


def _plain_loss(weight: Tensor, gram: Tensor, scales: Sequence[Tensor], spec: GridSpec) -> list[Tensor]:
    """As _kernel_loss, anywhere."""
    columns = weight.t().contiguous().unflatten(0, (-1, spec.group_size))  # [groups, g, out]
    scaled, error = torch.empty_like(columns), torch.empty_like(columns)
    losses = []
    for scale in scales:
        factor = scale.view(-1, spec.group_size, 1)
        torch.mul(columns, factor, out=scaled)
        low, high = scaled.amin(1, keepdim=True), scaled.amax(1, keepdim=True)
        grids.column_errors(scaled, grids.grid_from_range(low, high, spec), spec, error)
        flat = error.div_(factor).flatten(0, 1)
        losses.append(torch.dot((gram @ flat).flatten(), flat.flatten()))
    return losses


def _group_max(weight: Tensor, group_size: int) -> Tensor:
    grouped: Tensor = weight.abs().unflatten(1, (-1, group_size))
    return grouped.amax(-1, keepdim=True).clamp_min(1e-8)


def _pool(values: Tensor, tie: Tensor) -> Tensor:
    """Mean over the columns that share a number, put back on every one of them."""
    count = int(tie.max()) + 1
    sums = torch.zeros(count, device=values.device).index_add_(0, tie, values)
    sizes = torch.zeros(count, device=values.device).index_add_(0, tie, torch.ones_like(values))
    return (sums / sizes)[tie]


def scale_gram(gram: Tensor, scale: Tensor, in_place: bool = False) -> Tensor:
    """G of the inputs divided by ``scale``: ``S^-1 G S^-1``. ``in_place`` spares a copy as large as G."""
    inverse = 1.0 / scale
    scaled = gram.mul_(inverse) if in_place else gram * inverse
    return scaled.mul_(inverse.unsqueeze(1))


def untied(scale: Tensor, tie: Tensor | None, channels: int) -> Tensor:
    """One value for each channel of the producer, ``[channels]``, of one for each column that it feeds."""
    return scale if tie is None else scale.new_empty(channels).index_copy_(0, tie, scale)


def fold_norm(weight: Tensor, scale: Tensor, dtype: torch.dtype, offset: float) -> tuple[Tensor, Tensor]:
    """(weight of a norm that applies offset + weight, divided by ``scale`` and as ``dtype`` stores it; what it was
    divided by indeed). A channel whose quotient would be stored as 0 keeps its weight: near -1 a weight has few digits.
    """
    norm = weight + offset
    stored = (norm / scale - offset).to(dtype).float()
    stored = torch.where(stored + offset == 0, weight.to(dtype).float(), stored)
    left = stored + offset
    return stored, torch.where(left == 0, scale, norm / left)
