"""Methods on a uniform grid: search scales, fold them into their producers, choose codes, record the errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from qtool.convert.files.folder import FOLD_SCALES
from qtool.convert.files.writer import Spec
from qtool.convert.formats.codes import Codes
from qtool.convert.formats.plan import LinearPlan
from qtool.convert.models.feeds import Feed, Heads, Matrix, Norm, Nothing, Rows
from qtool.quantize import descent, rounding, scaling
from qtool.quantize import grid as grids
from qtool.quantize.descent import Chosen, Levels
from qtool.quantize.grid import GridSpec
from qtool.quantize.methods.method import Inputs, Layer, LayerCodes, LayerWork, Method, Needs, unquantized
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
    propagate_strength: Annotated[Number, Field(gt=0, le=1)] = 0.35  # .5 harms deep models: docs/benchmarks.md
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
        """Of the search for scales; beside the weights, three matrices like the Gram matrix to factorize it, or one and
        what the rounding holds."""
        weights = out * columns
        searched = scaling.SEARCHED * weights
        if self.rounding != "gptq":
            return searched
        rounding = descent.workspace(out, columns) if self.descent else 4 * weights
        return max(searched if self.scaling == "awq" else 0, 3 * columns**2 + weights, columns**2 + rounding)

    @property
    def asks_source(self: OnGrid) -> bool:
        """Scales are searched on the source's own inputs, the same for every output."""
        return self.scaling == "awq"

    def begin(self: OnGrid, layer: Layer, inputs: Inputs) -> LayerWork:
        """Search and fold the scales of all feeds."""
        return GridWork(self, layer.feeds, layer.weights, inputs.statistics)

    def quantize(self: OnGrid, layer: Layer, inputs: Inputs) -> LayerCodes:
        """As `quantize_layer`."""
        return quantize_layer(self, layer.feeds, layer.weights, inputs.statistics, inputs.owned)


def quantize_layer(
    method: OnGrid,
    feeds: Sequence[Feed],
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, InputStatistics],
    owned: bool = False,
) -> LayerCodes:
    """A layer on one set of statistics, collected before any of it is rounded. ``weights``: tensor name -> tensor of
    any float dtype (left unchanged); ``statistics``: a feed's name -> its input's, used up to spare memory where
    ``owned``, left unchanged otherwise."""
    work = GridWork(method, feeds, weights, statistics)
    for feed in feeds:
        work.round(feed, work.folded_statistics(feed, statistics[feed.name], owned))
    return work.finish()


class GridWork(LayerWork):
    """``weights``: tensor name -> tensor of any float dtype, left unchanged; ``statistics``: a feed's name -> the
    source's, of which scales are searched.

    columns, rows: module -> what its columns are multiplied by ``[in]`` and its rows divided by ``[out]``, ones where
    nothing is folded.
    """

    def __init__(
        self,
        method: OnGrid,
        feeds: Sequence[Feed],
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, InputStatistics],
    ) -> None:
        self._method, self._weights = method, weights
        self._folded = {name: tensor.float() if tensor.ndim == 1 else tensor for name, tensor in weights.items()}
        self._matrices = [matrix for feed in feeds for matrix in feed.consumers]
        self._codes: dict[str, Codes] = {}
        self._records: dict[str, dict[str, float]] = {}
        self._scaled: set[str] = set()
        self.columns: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        for matrix in self._matrices:
            weight = matrix.of(weights[matrix.tensor])
            self.rows[matrix.module], self.columns[matrix.module] = (
                torch.ones(size, device=weight.device) for size in weight.shape
            )
        for feed in feeds if method.scaling == "awq" else ():
            if feed.producer != Nothing():
                self._scale(feed, statistics[feed.name])

    def target(self, feed: Feed) -> Tensor:
        """As `LayerWork.target`."""
        return torch.cat([self._aim(matrix) for matrix in feed.consumers])

    def divisor(self, feed: Feed) -> Tensor | None:
        """As `LayerWork.divisor`."""
        return self.columns[feed.name] if feed.name in self._scaled else None

    def left(self) -> dict[str, Tensor]:
        """As `LayerWork.left`."""
        return {one.module: self._aim(one) for one in self._matrices if one.module not in self._codes}

    def finish(self) -> LayerCodes:
        """As `LayerWork.finish`."""
        kept = {f"{module}.columns": scale for module, scale in self.columns.items()}
        kept |= {f"{module}.rows": scale for module, scale in self.rows.items()}
        return LayerCodes(dict(self._codes), unquantized(self._matrices, self._folded), dict(self._records), kept)

    def folded_statistics(self, feed: Feed, stats: InputStatistics, owned: bool) -> InputStatistics:
        """The source's statistics as they are of inputs divided by the feed's scale."""
        scale = self.columns[feed.name]
        gram = scaling.scale_gram(stats.gram, scale, in_place=owned)
        return InputStatistics(stats.tokens, gram, abs_sum=stats.abs_sum / scale, absmax=stats.absmax / scale)

    def _aim(self, matrix: Matrix) -> Tensor:
        weight = matrix.of(self._weights[matrix.tensor]).float() * self.columns[matrix.module]
        return weight.div_(self.rows[matrix.module].unsqueeze(1))

    def _scale(self, feed: Feed, stats: InputStatistics) -> None:
        """Search a feed's scale and fold it: divide the producer by it; the columns that it feeds get what the
        producer, as stored, leaves over.

        Norms, biases and the tensors that only take the scale are folded here; rows and columns of matrices are noted
        and applied when they are rounded.
        """
        originals = [matrix.of(self._weights[matrix.tensor]).float() for matrix in feed.consumers]
        columns, spec = originals[0].shape[1], self._method.spec
        tie = feed.producer.ties(columns, stats.gram.device)
        search = scaling.search_scale(originals, stats.gram, stats.mean_abs, spec.for_columns(columns), tie)
        if search.scale is None:
            return
        scale, folded = search.scale, self._folded
        match feed.producer:
            case Norm(name, plus_one):
                weight, bias = f"{name}.weight", f"{name}.bias"
                own = scaling.untied(scale, tie, folded[weight].shape[0])
                folded[weight], own = scaling.fold_norm(folded[weight], own, spec.dtype, 1.0 if plus_one else 0.0)
                scale = own if tie is None else own[tie]
            case Rows(matrix) | Heads(matrix):
                bias = f"{matrix.module}.bias"
                own = scaling.untied(scale, tie, self.rows[matrix.module].shape[0])
                self.rows[matrix.module] = own
            case Nothing():
                return
        if bias in folded:
            folded[bias] = folded[bias] / own
        for name in feed.also:
            folded[name] = folded[name].float() * scale
        for matrix in feed.consumers:
            self.columns[matrix.module] = scale
        self._scaled.add(feed.name)

    def round(self, feed: Feed, stats: InputStatistics) -> None:
        """Choose codes for the consumers of one feed together (they share the Gram matrix) and record for each the
        relative output errors ``|(W - Ŵ) Xᵀ| / |W Xᵀ|`` of plain rounding and of the result, and ``|W - Ŵ| / |W|``."""
        method, target, scale = self._method, self.target(feed), self.columns[feed.name]
        spec = method.spec.for_columns(scale.shape[0])
        rounded, damp = _rounded(method, target, stats, spec)
        sizes = [self.rows[matrix.module].shape[0] for matrix in feed.consumers]
        parts = zip(
            feed.consumers, target.split(sizes), rounded.codes.split(sizes),
            rounded.grid.scale.split(sizes), rounded.grid.zero.split(sizes), strict=True,
        )  # fmt: skip
        for matrix, wanted, codes, scales, zeros in parts:
            grid, source = grids.Grid(scales, zeros), matrix.of(self._weights[matrix.tensor]).float()
            self._codes[matrix.module] = grids.to_codes(codes, grid, spec)
            error = grids.dequantize(codes, grid, spec).sub_(wanted).mul_(self.rows[matrix.module].unsqueeze(1))
            with tensor_float32() if method.rounding == "rtn" else nullcontext():
                loss = scaling.output_error(error, stats.gram)
            record = _record(source, error, loss, stats.gram, scale, spec)
            self._records[matrix.module] = record | {"damp": damp}


def _rounded(method: OnGrid, target: Tensor, stats: InputStatistics, spec: GridSpec) -> tuple[rounding.Rounded, float]:
    """(codes of ``target [out, in]``, the damping that they took). ``stats``: used up."""
    gram = stats.gram
    if method.rounding == "rtn":
        blocks = grids.diagonal_blocks(gram, spec.group_size) if method.clip else None
        fitted = grids.fit_minmax(target, spec) if blocks is None else grids.fit_clipped(target, blocks, spec)
        return rounding.Rounded(grids.quantize(target, fitted, spec), fitted), 0.0
    order = rounding.activation_order(gram) if method.act_order else None
    factor = rounding.factorize(gram, method.damp_percent, order)
    goal = target.clone()
    if stats.drift is not None:
        with tensor_float32():
            drift, stats.drift = stats.output_drift(target), None  # large, and not needed again
            goal = rounding.propagated_target(target, drift, factor, method.propagate_strength)
        del drift
    if method.descent:
        return _descend(method, goal, factor, gram, spec), factor.damp
    return rounding.gptq(goal, factor, spec, method.clip, gram), factor.damp


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
