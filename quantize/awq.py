"""AWQ's scale search on Gram matrices: no forward is repeated for a grid point.

Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv 2306.00978. For inputs X ``[tokens, in]`` with G = XᵀX
the search loss ``|(W - Ŵ) Xᵀ|² = tr((W - Ŵ) G (W - Ŵ)ᵀ)`` needs G alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.quantize import grid as grids
from qtool.quantize.grid import GridSpec

POINTS = 20
PREVIEW_ROWS = 4  # every fourth row ranks the candidates
FINALISTS = 4  # the best few are then judged on all rows


@dataclass(frozen=True)
class ScaleSearch:
    """``scale [in]`` or None when no candidate beat leaving the weights alone; losses as fractions
    of ``tr(W G Wᵀ)``."""

    scale: Tensor | None
    loss: float
    loss_unscaled: float


@contextmanager
def tensor_float32() -> Iterator[None]:
    """TF32 products on an accelerator: 2e-4 off, enough for losses of plain roundings, not of compensated ones."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def output_error(error: Tensor, gram: Tensor) -> Tensor:
    """``tr(E G Eᵀ)``, a scalar: the squared output error of a weight error ``[out, in]``, summed over all tokens."""
    return torch.dot((error @ gram).flatten(), error.flatten())


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
    preview = stacked[::PREVIEW_ROWS].contiguous()
    with tensor_float32():
        ranks = torch.stack([_scaled_loss(preview, gram, scale, spec) for scale in candidates]).argsort()
        finalists = candidates[ranks[:FINALISTS]]
        losses = torch.stack([_scaled_loss(stacked, gram, scale, spec) for scale in (None, *finalists)])
        total = output_error(stacked, gram).clamp_min(1e-30)
    relative = (losses / total).tolist()  # the one wait for the device
    best = min(range(len(relative)), key=relative.__getitem__)
    scale = None if best == 0 else finalists[best - 1]
    return ScaleSearch(scale, relative[best], relative[0])


def _scaled_loss(weight: Tensor, gram: Tensor, scale: Tensor | None, spec: GridSpec) -> Tensor:
    error = _scaled_error(weight, scale, spec)
    return output_error(error, gram)


def _scaled_error(weight: Tensor, scale: Tensor | None, spec: GridSpec) -> Tensor:
    """``Q(W s)/s - W``, round to nearest on the min/max grid; ``scale`` None is s = 1."""
    if weight.is_cuda and spec.group_size <= grids.KERNEL_GROUP:
        from qtool.quantize.kernels import scaled_error

        factor = torch.ones_like(weight[0]) if scale is None else scale
        half = spec.dtype == torch.float16
        return scaled_error(weight.contiguous(), factor, spec.group_size, spec.levels, spec.sym, half)
    if scale is None:
        return grids.round_to_nearest(weight, spec).sub_(weight)
    return grids.round_to_nearest(weight * scale, spec).div_(scale).sub_(weight)


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
