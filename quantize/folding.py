"""One decoder layer for one output: search scales, fold them into their producers, choose codes, record the errors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.quantize import grid as grids
from qtool.quantize.architectures import Architecture, InputGroup
from qtool.quantize.layer import LayerOutput
from qtool.quantize.methods import awq, gptq
from qtool.quantize.methods.sections import GridMethod
from qtool.quantize.precision import tensor_float32
from qtool.quantize.statistics import InputStatistics


@dataclass(frozen=True)
class Heads:
    """Attention geometry: each of ``kv`` key/value heads of ``dim`` rows feeds ``repeat`` query heads."""

    kv: int
    repeat: int
    dim: int


def quantize_layer(
    method: GridMethod,
    architecture: Architecture,
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, InputStatistics],
    heads: Heads,
    owned: bool = False,
) -> LayerOutput:
    """``weights``: tensor name -> tensor of any float dtype (left unchanged); ``statistics``: group name -> its
    input's, used up to spare memory where ``owned``, left unchanged otherwise."""
    folded = {name: tensor.float() if tensor.ndim == 1 else tensor for name, tensor in weights.items()}
    output = LayerOutput()
    for group in architecture.groups:
        for linear in group.linears:
            out, columns = weights[f"{linear}.weight"].shape
            device = weights[f"{linear}.weight"].device
            output.columns[linear] = torch.ones(columns, device=device)
            output.rows[linear] = torch.ones(out, device=device)
    for group in architecture.groups if method.scaling == "awq" else ():
        stats = statistics[group.name]
        tie = kv_rows(heads, stats.gram.device) if group.kind == "heads" else None
        originals = [weights[f"{linear}.weight"].float() for linear in group.linears]
        spec = method.spec.for_columns(originals[0].shape[1])
        search = awq.search_scale(originals, stats.gram, stats.mean_abs, spec, tie)
        if search.scale is not None:
            _fold(group, search.scale, folded, tie, method.spec.dtype, output)
    for group in architecture.groups:
        _round_group(method, group, weights, statistics[group.name], output, owned)
    output.tensors = {name: t for name, t in folded.items() if name.removesuffix(".weight") not in output.codes}
    return output


def kv_rows(heads: Heads, device: torch.device) -> Tensor:
    """For each input column of o_proj, the row of v_proj that feeds it: int64 ``[heads * dim]``."""
    column = torch.arange(heads.kv * heads.repeat * heads.dim, device=device)
    return column // (heads.dim * heads.repeat) * heads.dim + column % heads.dim


def _fold(
    group: InputGroup,
    scale: Tensor,
    folded: dict[str, Tensor],
    tie: Tensor | None,
    dtype: torch.dtype,
    output: LayerOutput,
) -> None:
    """Divide the producer by ``scale``; the linears' columns get what the producer, as stored, leaves over.

    Norms and biases are folded here; rows and columns of linears are noted and applied when they are rounded.
    """
    if group.kind in ("norm", "norm_plus_one"):
        name = f"{group.producer}.weight"
        folded[name], scale = _fold_norm(folded[name], scale, dtype, 1.0 if group.kind == "norm_plus_one" else 0.0)
    else:
        rows = scale if tie is None else torch.empty_like(output.rows[group.producer]).index_copy_(0, tie, scale)
        bias = f"{group.producer}.bias"
        if bias in folded:
            folded[bias] = folded[bias] / rows
        output.rows[group.producer] = rows
    for linear in group.linears:
        output.columns[linear] = scale


def _fold_norm(weight: Tensor, scale: Tensor, dtype: torch.dtype, offset: float) -> tuple[Tensor, Tensor]:
    """(weight of a norm that applies offset + weight, divided by ``scale`` and as ``dtype`` stores it; what it was
    divided by indeed). A channel whose quotient would be stored as 0 keeps its weight: near -1 a weight has few digits.
    """
    norm = weight + offset
    stored = (norm / scale - offset).to(dtype).float()
    stored = torch.where(stored + offset == 0, weight.to(dtype).float(), stored)
    left = stored + offset
    return stored, torch.where(left == 0, scale, norm / left)


def _round_group(
    method: GridMethod,
    group: InputGroup,
    weights: Mapping[str, Tensor],
    stats: InputStatistics,
    output: LayerOutput,
    owned: bool,
) -> None:
    """Choose codes for the linears of one group together (they share the Gram matrix) and record for each the relative
    output errors ``|(W - Ŵ) Xᵀ| / |W Xᵀ|`` of plain rounding and of the result, and ``|W - Ŵ| / |W|``."""
    scale = output.columns[group.linears[0]]
    spec = method.spec.for_columns(scale.shape[0])
    sources = [weights[f"{linear}.weight"].float() for linear in group.linears]
    sizes = [source.shape[0] for source in sources]
    rows = torch.cat([output.rows[linear] for linear in group.linears]).unsqueeze(1)
    target = torch.cat(sources).mul_(scale).div_(rows)
    gram = awq.scale_gram(stats.gram, scale, in_place=owned)
    damp = 0.0
    if method.rounding == "gptq":
        drift = None
        if stats.drift is not None:
            with tensor_float32():
                drift = stats.output_drift(torch.cat(sources)) / rows / scale
            if owned:
                stats.drift = None  # can be as large as the Gram matrix, and is not needed again
        order = gptq.activation_order(gram) if method.act_order else None
        factor = gptq.factorize(gram, method.damp_percent, order)
        goal = target.clone()
        if drift is not None:
            with tensor_float32():
                goal = gptq.propagated_target(target, drift, factor, method.propagate_strength)
        rounded = gptq.gptq(goal, factor, spec, method.clip, gram)
        damp = factor.damp
        del factor, goal, drift
    else:
        fitted = (
            grids.fit_clipped(target, grids.diagonal_blocks(gram, spec.group_size), spec)
            if method.clip
            else grids.fit_minmax(target, spec)
        )
        rounded = gptq.Rounded(grids.quantize(target, fitted, spec), fitted)
    parts = zip(
        group.linears, sources, target.split(sizes), rounded.codes.split(sizes),
        rounded.grid.scale.split(sizes), rounded.grid.zero.split(sizes), strict=True,
    )  # fmt: skip
    for linear, source, wanted, codes, scales, zeros in parts:
        grid = grids.Grid(scales, zeros)
        output.codes[linear] = grids.to_codes(codes, grid, spec)
        error = grids.dequantize(codes, grid, spec).sub_(wanted).mul_(output.rows[linear].unsqueeze(1))
        with tensor_float32() if method.rounding == "rtn" else nullcontext():
            loss = awq.output_error(error, gram)
        output.records[linear] = _record(source, error, loss, gram, scale, spec) | {"damp": damp}


def _record(
    source: Tensor, error: Tensor, loss: Tensor, gram: Tensor, scale: Tensor, spec: grids.GridSpec
) -> dict[str, float]:
    """``error``: of the scaled weight; ``gram``: of the scaled inputs. W s meets X / s, so its output errors are
    those of the source's own weights and inputs."""
    with tensor_float32():
        energy = awq.output_error(source * scale, gram).clamp_min(1e-30)
        plain = awq.output_error(grids.round_to_nearest(source, spec).sub_(source).mul_(scale), gram)
    figures = [
        (plain.clamp_min(0) / energy).sqrt(),
        (loss.clamp_min(0) / energy).sqrt(),
        error.div_(scale).norm() / source.norm().clamp_min(1e-30),
    ]
    rtn, result, frobenius = (float(f"{figure:.6g}") for figure in torch.stack(figures).tolist())
    return {"rtn_error": rtn, "error": result, "frobenius": frobenius}
