"""AWQ's scale search on Gram matrices: no forward is repeated for a grid point.

Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv 2306.00978. For inputs X ``[tokens, in]`` with G = XᵀX
the search loss ``|(W - Ŵ) Xᵀ|² = tr((W - Ŵ) G (W - Ŵ)ᵀ)`` needs G alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.quantize import grid as grids
from qtool.quantize.crew import SOLO, Crew
from qtool.quantize.grid import GridSpec
from qtool.quantize.precision import bfloat16_products, float32_product, tensor_float32

POINTS = 20
PREVIEW_ROWS = 4  # every fourth row ranks the candidates
FINALISTS = 4  # the best few are then judged on all rows
SEARCHED = 5  # copies of the weights at most while scales are searched: theirs, stacked, errors, two of products
AT_ONCE = 32  # experts that are worked on at once, so that temporaries stay small beside their weights
LOSS_COLUMNS = 4096  # of a Gram matrix at a time, so that temporaries stay small


@dataclass(frozen=True)
class ScaleSearch:
    """``scale [in]`` or None when no candidate beat leaving the weights alone; losses as fractions
    of ``tr(W G Wᵀ)``."""

    scale: Tensor | None
    loss: float
    loss_unscaled: float


@dataclass(frozen=True)
class Weighed:
    """Weights of any float dtype and the Gram matrix of their inputs: ``[out, in]`` and ``[in, in]``, or a stack of
    experts ``[E, out, in]`` and ``[E, in, in]``. ``counts``: what its losses count beside those of others."""

    weight: Tensor
    gram: Tensor
    counts: float = 1.0

    def slices(self) -> Iterator[tuple[int, Weighed]]:
        """(where it begins, a few experts of the stack) after the other, in float32."""
        if self.weight.ndim == 2:
            yield 0, Weighed(self.weight.float(), self.gram, self.counts)
            return
        for start in range(0, len(self.weight), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            yield start, Weighed(self.weight[some].float(), self.gram[some], self.counts)


def output_error(error: Tensor, gram: Tensor) -> Tensor:
    """``tr(E G Eᵀ)``, a scalar: the squared output error of a weight error ``[out, in]``, summed over all tokens. Of a
    stack ``[E, out, in]``: ``[E]``."""
    if error.ndim == 3:
        return (float32_product(error, gram).mul_(error)).sum((-2, -1))
    if not error.is_cuda:
        return torch.dot((error @ gram).flatten(), error.flatten())
    step = LOSS_COLUMNS
    parts = [
        (float32_product(error, gram[:, start : start + step]) * error[:, start : start + step]).sum()
        for start in range(0, gram.shape[1], step)
    ]
    return torch.stack(parts).sum()


def mean_relative(weight: Tensor, group_size: int) -> Tensor:
    """The mean over the rows of |w| relative to the largest of its group, ``[in]`` or ``[E, in]``."""
    relative = weight.abs().unflatten(-1, (-1, group_size)) / _group_max(weight, group_size)
    mean: Tensor = relative.flatten(-2).mean(-2)
    return mean


def candidate_scales(mean_abs: Tensor, relative: Tensor) -> Tensor:
    """``[2 * POINTS, in]``: activation-only ``x^a`` and duo ``x^a / w^(1 - a)``, a = 0, 1/20 … 19/20.

    relative: w, as `mean_relative`. Each row is centred: ``sqrt(max * min) = 1``. For ``[E, in]`` each:
    ``[2 * POINTS, E, in]``.
    """
    x = mean_abs.clamp_min(1e-8).unsqueeze(0)
    ratio = (torch.arange(POINTS, device=mean_abs.device) / POINTS).view(-1, *[1] * mean_abs.ndim)
    activation = x.pow(ratio)
    duo = activation / (relative.unsqueeze(0).pow(1 - ratio) + 1e-4)
    scales = torch.cat([activation, duo]).clamp_min_(1e-4)
    return scales / (scales.amax(-1, keepdim=True) * scales.amin(-1, keepdim=True)).sqrt()


def search_scale(
    parts: Sequence[Weighed], mean_abs: Tensor, spec: GridSpec, tie: Tensor | None = None, crew: Crew = SOLO
) -> ScaleSearch:
    """The scale of one input that loses least when all weights that it feeds are rounded to nearest: one matrix, or
    experts and others together, their losses summed.

    ``tie [in]`` (int64): columns with the same number must share one scale (query heads fed by one value head).
    ``crew``: each member tries some of the candidates.
    """
    relative = _relative(parts, spec.group_size)
    if tie is not None:
        mean_abs = _pool(mean_abs, tie)
    candidates = candidate_scales(mean_abs, relative)
    if tie is not None:
        candidates = _pool(candidates, tie)
    with _ranking(mean_abs.is_cuda):
        ranks = _losses(parts, candidates, spec, crew, PREVIEW_ROWS).argsort()
    finalists = candidates[ranks[:FINALISTS]]
    with tensor_float32():
        losses = _losses(parts, torch.stack([torch.ones_like(mean_abs), *finalists]), spec, crew)
        energy = [
            output_error(part.weight, part.gram).sum() * part.counts for whole in parts for _, part in whole.slices()
        ]
    relative_losses = (losses / torch.stack(energy).sum().clamp_min(1e-30)).tolist()  # the one wait for the device
    best = min(range(len(relative_losses)), key=relative_losses.__getitem__)
    scale = None if best == 0 else finalists[best - 1]
    return ScaleSearch(scale, relative_losses[best], relative_losses[0])


def search_own_scales(stack: Weighed, mean_abs: Tensor, spec: GridSpec, crew: Crew = SOLO) -> Tensor:
    """`search_scale` of each problem of a stack by itself, ``[E, in]``; ones where no candidate beat them.
    ``mean_abs [E, in]``."""
    found = []
    for start, part in stack.slices():
        own = mean_abs[start : start + len(part.weight)]
        candidates = candidate_scales(own, mean_relative(part.weight, spec.group_size))
        preview = Weighed(part.weight[:, ::PREVIEW_ROWS], part.gram)
        with _ranking(own.is_cuda):
            ranks = _errors_of(preview, candidates, spec, crew).argsort(0)
        problems = torch.arange(len(own), device=own.device)
        finalists = torch.stack([torch.ones_like(own), *(candidates[rank, problems] for rank in ranks[:FINALISTS])])
        with tensor_float32():
            losses = _errors_of(part, finalists, spec, crew)
        found.append(finalists[losses.argmin(0), problems])
    return torch.cat(found)


@contextmanager
def _ranking(cuda: bool) -> Iterator[None]:
    """Products that are exact enough to rank candidates."""
    with tensor_float32(), nullcontext() if cuda else bfloat16_products():
        yield


def _relative(parts: Sequence[Weighed], group_size: int) -> Tensor:
    """`mean_relative` over the rows of all parts."""
    means, rows = [], []
    for whole in parts:
        for _, part in whole.slices():
            means.append(mean_relative(part.weight.flatten(0, -2), group_size))
            rows.append(float(part.weight.shape[:-1].numel()))
    weights = torch.tensor(rows, device=means[0].device)
    return (torch.stack(means) * weights.unsqueeze(1)).sum(0) / weights.sum()


def _losses(parts: Sequence[Weighed], scales: Tensor, spec: GridSpec, crew: Crew, every: int = 1) -> Tensor:
    """The summed loss of each of ``scales [n, in]``: ``[n]``. ``every``: of so many rows one counts."""
    total = torch.zeros(len(scales), device=scales.device)
    for whole in parts:
        for _, part in whole.slices():
            seen = Weighed(part.weight[..., ::every, :], part.gram)
            total += _errors_of(seen, scales, spec, crew).flatten(1).sum(1) * part.counts
    return total


def _errors_of(part: Weighed, scales: Tensor, spec: GridSpec, crew: Crew) -> Tensor:
    """`_errors` of ``scales [n, ...]``, each computed by one member of the crew: ``[n, 1]``, or ``[n, E]``."""
    mine = list(crew.share(list(scales)))
    problems = len(part.weight) if part.weight.ndim == 3 else 1
    own = torch.stack(_errors(part, mine, spec)) if mine else scales.new_empty(0, problems)
    return crew.whole(own, len(scales))


def _errors(part: Weighed, scales: Sequence[Tensor], spec: GridSpec) -> list[Tensor]:
    """Output errors of ``Q(W s)/s``, round to nearest on the min/max grid, for each scale: ``[1]`` each, or ``[E]``. A
    scale is ``[in]``, of a stack also ``[E, in]``."""
    if not part.weight.is_cuda or spec.group_size > grids.KERNEL_GROUP:
        return _plain_errors(part, scales, spec)
    from qtool.quantize.kernels import scaled_error

    weight, half = part.weight.contiguous(), spec.dtype == torch.float16
    return [
        output_error(scaled_error(weight, scale, spec.group_size, spec.levels, spec.sym, half), part.gram).view(-1)
        for scale in scales
    ]


def _plain_errors(part: Weighed, scales: Sequence[Tensor], spec: GridSpec) -> list[Tensor]:
    """As `_errors`, anywhere."""
    columns = part.weight.mT.contiguous().unflatten(-2, (-1, spec.group_size))  # [..., groups, g, out]
    scaled, error = torch.empty_like(columns), torch.empty_like(columns)
    losses = []
    for scale in scales:
        factor = scale.unflatten(-1, (-1, spec.group_size)).unsqueeze(-1)
        torch.mul(columns, factor, out=scaled)
        low, high = scaled.amin(-2, keepdim=True), scaled.amax(-2, keepdim=True)
        grids.column_errors(scaled, grids.grid_from_range(low, high, spec), spec, error)
        flat = error.div_(factor).flatten(-3, -2)
        product = part.gram @ flat
        if flat.ndim == 2:
            losses.append(torch.dot(product.flatten(), flat.flatten()).view(1))
        else:
            losses.append(product.mul_(flat).sum((-2, -1)))
    return losses


def _group_max(weight: Tensor, group_size: int) -> Tensor:
    grouped: Tensor = weight.abs().unflatten(-1, (-1, group_size))
    return grouped.amax(-1, keepdim=True).clamp_min(1e-8)


def _pool(values: Tensor, tie: Tensor) -> Tensor:
    """Of ``[..., in]`` the mean over the columns that share a number, as many of each, put back on every one of them.
    Sorted, and not added where they belong: an accelerator would do that in an order that changes from run to run."""
    each = int((tie == 0).sum())
    together = values[..., tie.argsort(stable=True)].unflatten(-1, (-1, each))
    pooled: Tensor = together.mean(-1)[..., tie]
    return pooled


def scale_gram(gram: Tensor, scale: Tensor, in_place: bool = False) -> Tensor:
    """G of the inputs divided by ``scale``: ``S^-1 G S^-1``; of a stack ``[E, in]``. ``in_place`` spares a copy as
    large as G."""
    inverse = 1.0 / scale
    row = inverse.unsqueeze(-2) if gram.ndim == 3 else inverse
    scaled = gram.mul_(row) if in_place else gram * row
    return scaled.mul_(inverse.unsqueeze(-1))


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
