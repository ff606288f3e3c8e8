"""Methods on a uniform grid: search scales, fold them into their producers, choose codes, record the errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from qtool.convert.files.folder import FOLD_SCALES
from qtool.convert.files.writer import Spec
from qtool.convert.formats.codes import Codes
from qtool.convert.formats.plan import LinearPlan
from qtool.convert.models.feeds import Feed, Heads, Norm, Nothing, Rows
from qtool.quantize import descent, rounding, scaling
from qtool.quantize import grid as grids
from qtool.quantize.descent import Chosen, Levels
from qtool.quantize.grid import GridSpec
from qtool.quantize.methods.method import Inputs, Layer, LayerCodes, Method, Needs, unquantized
from qtool.quantize.methods.number import Number
from qtool.quantize.precision import tensor_float32
from qtool.quantize.statistics import InputStatistics

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class OnGrid(Protocol):
    """A method that chooses integer codes on a uniform grid from Gram matrices: scaling and rounding are its own."""

    clip: bool
    damp_percent: float
    descent: bool
    signed: bool
    propagate_error: bool
    propagate_strength: float

    @property
    def scaling(self) -> str: ...

    @property
    def rounding(self) -> str: ...

    @property
    def act_order(self) -> bool: ...

    @property
    def spec(self) -> GridSpec: ...


class GridMethod(Method):
    """What AWQ and GPTQ outputs have in common."""

    clip: bool = True
    descent: bool = True
    damp_percent: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    propagate_error: bool = True
    propagate_strength: Annotated[Number, Field(gt=0, le=1)] = 0.25  # .5 harms deep models: docs/benchmarks.md
    dtype: Literal["float16", "bfloat16"] = "float16"

    @property
    def needs(self: OnGrid) -> Needs:
        """Only a rounding that compensates can make up for what its own prefix did."""
        return Needs.OWN_STREAM if self.rounding == "gptq" and self.propagate_error else Needs.GRAM

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of scales and of everything that is not quantized."""
        return DTYPES[self.dtype]

    @property
    def kept_as(self) -> str:
        """What the columns were multiplied by, and the rows divided by."""
        return FOLD_SCALES

    def kept_specs(self, matrices: Sequence[LinearPlan]) -> dict[str, Spec]:
        """Ones where nothing is folded."""
        specs: dict[str, Spec] = {}
        for matrix in matrices:
            specs[f"{matrix.name}.columns"] = (torch.float32, (matrix.columns,))
            specs[f"{matrix.name}.rows"] = (torch.float32, (matrix.out,))
        return specs

    def workspace(self: OnGrid, out: int, columns: int) -> int:
        """Three matrices like the Gram matrix to factorize it, and copies of the weights."""
        copies = 6 if self.descent else 4
        compensated = 3 * columns**2 + copies * out * columns if self.rounding == "gptq" else 0
        return max(compensated, (6 if self.scaling == "awq" else 4) * out * columns)

    def quantize(self: OnGrid, layer: Layer, inputs: Inputs) -> LayerCodes:
        """As `quantize_layer`."""
        return quantize_layer(self, layer.feeds, layer.weights, inputs.statistics, inputs.owned)


@dataclass
class Folded:
    """What is known of a layer while it is worked on. columns, rows: module -> what its columns were multiplied by
    ``[in]`` and its rows divided by ``[out]`` (ones where nothing is folded)."""

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, Codes] = field(default_factory=dict)
    records: dict[str, dict[str, float]] = field(default_factory=dict)


def quantize_layer(
    method: OnGrid,
    feeds: Sequence[Feed],
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, InputStatistics],
    owned: bool = False,
) -> LayerCodes:
    """``weights``: tensor name -> tensor of any float dtype (left unchanged); ``statistics``: a feed's name -> its
    input's, used up to spare memory where ``owned``, left unchanged otherwise."""
    folded = {name: tensor.float() if tensor.ndim == 1 else tensor for name, tensor in weights.items()}
    output = Folded()
    matrices = [matrix for feed in feeds for matrix in feed.consumers]
    for matrix in matrices:
        weight = matrix.of(weights[matrix.tensor])
        output.rows[matrix.module], output.columns[matrix.module] = (
            torch.ones(size, device=weight.device) for size in weight.shape
        )
    for feed in feeds if method.scaling == "awq" else ():
        if feed.producer != Nothing():
            _scale(method, feed, weights, statistics[feed.name], folded, output)
    for feed in feeds:
        _round_feed(method, feed, weights, statistics[feed.name], output, owned)
    kept = {f"{module}.columns": scale for module, scale in output.columns.items()}
    kept |= {f"{module}.rows": scale for module, scale in output.rows.items()}
    return LayerCodes(output.codes, unquantized(matrices, folded), output.records, kept)


def _scale(
    method: OnGrid,
    feed: Feed,
    weights: Mapping[str, Tensor],
    stats: InputStatistics,
    folded: dict[str, Tensor],
    output: Folded,
) -> None:
    """Search a feed's scale and fold it: divide the producer by it; the columns that it feeds get what the producer, as
    stored, leaves over.

    Norms, biases and the tensors that only take the scale are folded here; rows and columns of matrices are noted and
    applied when they are rounded.
    """
    originals = [matrix.of(weights[matrix.tensor]).float() for matrix in feed.consumers]
    columns = originals[0].shape[1]
    tie = feed.producer.ties(columns, stats.gram.device)
    search = scaling.search_scale(originals, stats.gram, stats.mean_abs, method.spec.for_columns(columns), tie)
    if search.scale is None:
        return
    scale = search.scale
    match feed.producer:
        case Norm(name, plus_one):
            weight, bias = f"{name}.weight", f"{name}.bias"
            own = _untied(scale, tie, folded[weight].shape[0])
            folded[weight], own = _fold_norm(folded[weight], own, method.spec.dtype, 1.0 if plus_one else 0.0)
            scale = own if tie is None else own[tie]
        case Rows(matrix) | Heads(matrix):
            bias = f"{matrix.module}.bias"
            own = _untied(scale, tie, output.rows[matrix.module].shape[0])
            output.rows[matrix.module] = own
        case Nothing():
            return
    if bias in folded:
        folded[bias] = folded[bias] / own
    for name in feed.also:
        folded[name] = folded[name].float() * scale
    for matrix in feed.consumers:
        output.columns[matrix.module] = scale


def _untied(scale: Tensor, tie: Tensor | None, channels: int) -> Tensor:
    """One value for each channel of the producer, ``[channels]``, of one for each column that it feeds."""
    return scale if tie is None else scale.new_empty(channels).index_copy_(0, tie, scale)


def _fold_norm(weight: Tensor, scale: Tensor, dtype: torch.dtype, offset: float) -> tuple[Tensor, Tensor]:
    """(weight of a norm that applies offset + weight, divided by ``scale`` and as ``dtype`` stores it; what it was
    divided by indeed). A channel whose quotient would be stored as 0 keeps its weight: near -1 a weight has few digits.
    """
    norm = weight + offset
    stored = (norm / scale - offset).to(dtype).float()
    stored = torch.where(stored + offset == 0, weight.to(dtype).float(), stored)
    left = stored + offset
    return stored, torch.where(left == 0, scale, norm / left)


def _round_feed(
    method: OnGrid,
    feed: Feed,
    weights: Mapping[str, Tensor],
    stats: InputStatistics,
    output: Folded,
    owned: bool,
) -> None:
    """Choose codes for the consumers of one feed together (they share the Gram matrix) and record for each the relative
    output errors ``|(W - Ŵ) Xᵀ| / |W Xᵀ|`` of plain rounding and of the result, and ``|W - Ŵ| / |W|``."""
    modules = [matrix.module for matrix in feed.consumers]
    scale = output.columns[modules[0]]
    spec = method.spec.for_columns(scale.shape[0])
    sources = [matrix.of(weights[matrix.tensor]).float() for matrix in feed.consumers]
    sizes = [source.shape[0] for source in sources]
    rows = torch.cat([output.rows[module] for module in modules]).unsqueeze(1)
    target = torch.cat(sources).mul_(scale).div_(rows)
    gram = scaling.scale_gram(stats.gram, scale, in_place=owned)
    damp = 0.0
    if method.rounding == "gptq":
        drift = None
        if stats.drift is not None:
            with tensor_float32():
                drift = stats.output_drift(torch.cat(sources)) / rows / scale
            if owned:
                stats.drift = None  # can be as large as the Gram matrix, and is not needed again
        order = rounding.activation_order(gram) if method.act_order else None
        factor = rounding.factorize(gram, method.damp_percent, order)
        goal = target.clone()
        if drift is not None:
            with tensor_float32():
                goal = rounding.propagated_target(target, drift, factor, method.propagate_strength)
        if method.descent:
            rounded = _descend(method, goal, factor, gram, spec)
        else:
            rounded = rounding.gptq(goal, factor, spec, method.clip, gram)
        damp = factor.damp
        del factor, goal, drift
    else:
        fitted = (
            grids.fit_clipped(target, grids.diagonal_blocks(gram, spec.group_size), spec)
            if method.clip
            else grids.fit_minmax(target, spec)
        )
        rounded = rounding.Rounded(grids.quantize(target, fitted, spec), fitted)
    parts = zip(
        modules, sources, target.split(sizes), rounded.codes.split(sizes),
        rounded.grid.scale.split(sizes), rounded.grid.zero.split(sizes), strict=True,
    )  # fmt: skip
    for module, source, wanted, codes, scales, zeros in parts:
        grid = grids.Grid(scales, zeros)
        output.codes[module] = grids.to_codes(codes, grid, spec)
        error = grids.dequantize(codes, grid, spec).sub_(wanted).mul_(output.rows[module].unsqueeze(1))
        with tensor_float32() if method.rounding == "rtn" else nullcontext():
            loss = scaling.output_error(error, gram)
        output.records[module] = _record(source, error, loss, gram, scale, spec) | {"damp": damp}


def _descend(method: OnGrid, goal: Tensor, factor: rounding.Factor, gram: Tensor, spec: GridSpec) -> rounding.Rounded:
    """Scales and codes by descent, from one pass in the columns' order; with act-order, and where a row is one group,
    from GPTQ's codes. ``gram``: damped as the factor is, and put back."""
    levels = Levels.of_grid(spec, method.signed)
    if factor.order is None and spec.group_size <= descent.BLOCK:
        begun = descent.begin(goal, factor, levels)
    else:
        plain = rounding.gptq(goal.clone(), factor, spec, method.clip, gram)
        begun = Chosen(grids.minus_zeros(plain.codes, plain.grid), plain.grid.scale, plain.grid.zero)
    diagonal = gram.diagonal().clone()
    gram.diagonal().add_(factor.damp * diagonal.mean())
    chosen = descent.descend(goal, begun, gram, levels)
    gram.diagonal().copy_(diagonal)
    return rounding.Rounded(chosen.codes(), chosen.grid)


def _record(
    source: Tensor, error: Tensor, loss: Tensor, gram: Tensor, scale: Tensor, spec: grids.GridSpec
) -> dict[str, float]:
    """``error``: of the scaled weight; ``gram``: of the scaled inputs. W s meets X / s, so its output errors are
    those of the source's own weights and inputs."""
    with tensor_float32():
        energy = scaling.output_error(source * scale, gram).clamp_min(1e-30)
        plain = scaling.output_error(grids.round_to_nearest(source, spec).sub_(source).mul_(scale), gram)
    figures = [
        (plain.clamp_min(0) / energy).sqrt(),
        (loss.clamp_min(0) / energy).sqrt(),
        error.div_(scale).norm() / source.norm().clamp_min(1e-30),
    ]
    rtn, result, frobenius = (float(f"{figure:.6g}") for figure in torch.stack(figures).tolist())
    return {"rtn_error": rtn, "error": result, "frobenius": frobenius}
