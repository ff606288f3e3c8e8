"""A layer on a uniform grid: search scales, fold them into their producers, choose codes, record the errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from qtool.convert.formats.codes import Codes
from qtool.convert.formats.plan import LinearPlan
from qtool.convert.models.feeds import Feed, Heads, Matrix, Norm, Nothing, Rows
from qtool.quantize import descent, rounding, scaling
from qtool.quantize import grid as grids
from qtool.quantize.chosen import Chosen, Levels
from qtool.quantize.crew import SOLO, Crew, Pieces
from qtool.quantize.grid import GridSpec
from qtool.quantize.methods.grid_records import records_of
from qtool.quantize.methods.method import LayerCodes, LayerWork, Statistics, unquantized
from qtool.quantize.precision import tensor_float32
from qtool.quantize.scaling import Weighed
from qtool.quantize.stacks import Stack, steps_of
from qtool.quantize.statistics import InputStatistics


class OnGrid(Protocol):
    """A method that chooses integer codes on a uniform grid from Gram matrices: scaling and rounding are its own."""

    clip: bool
    damp_percent: float
    descent: bool
    propagate_error: bool
    propagate_strength: float

    @property
    def signed(self) -> bool: ...

    @property
    def scaling(self) -> str: ...

    @property
    def rounding(self) -> str: ...

    @property
    def act_order(self) -> bool: ...

    @property
    def spec(self) -> GridSpec: ...


class GridWork(LayerWork):
    """``weights``: tensor name -> tensor of any float dtype, left unchanged; ``statistics``: a stack's name -> the
    source's, of which scales are searched; ``plans``: module -> plan of each matrix that is quantized (None: of all, as
    the method's grid is). A matrix without a plan takes every scale as the others do, and is not rounded.

    columns, rows: module -> what its columns are multiplied by ``[in]`` and its rows divided by ``[out]``, ones where
    nothing is folded.
    """

    def __init__(
        self,
        method: OnGrid,
        feeds: Sequence[Feed],
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        plans: Mapping[str, LinearPlan] | None = None,
        crew: Crew = SOLO,
    ) -> None:
        self._method, self._weights, self._plans, self._crew = method, weights, plans, crew
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
        for step in steps_of(feeds) if method.scaling == "awq" else ():
            stacks = [stack for stack in step.stacks if self.quantizes(stack)]
            for stack in stacks:
                if stack.inner:
                    self._scale_each(stack, statistics[stack.name])
            rest = [stack for stack in stacks if not stack.inner]
            for feed in dict.fromkeys(stack.feeds[0] for stack in rest):
                self._scale(feed, [(stack, statistics[stack.name]) for stack in rest if stack.feeds[0] == feed])

    def quantizes(self, stack: Stack) -> bool:
        """Whether its matrices get codes: all of them, or none."""
        return self._plans is None or stack.name in self._plans

    def _spec(self, stack: Stack, columns: int) -> GridSpec:
        """Its own grid."""
        if self._plans is None:
            return self._method.spec.for_columns(columns)
        plan = self._plans[stack.name]
        return replace(self._method.spec, bits=plan.bits, group_size=plan.group_size)

    def target(self, stack: Stack) -> Tensor:
        """As `LayerWork.target`."""
        aims = [torch.cat([self._aim(matrix) for matrix in problem]) for problem in stack.problems]
        return torch.stack(aims) if stack.routed else aims[0]

    def divisor(self, stack: Stack) -> Tensor | None:
        """As `LayerWork.divisor`."""
        if stack.name not in self._scaled:
            return None
        return self._columns(stack) if stack.inner else self.columns[stack.name]

    def left(self) -> Iterator[tuple[str, Tensor]]:
        """As `LayerWork.left`."""
        todo = [one for one in self._matrices if one.module not in self._codes and self._has_plan(one)]
        return ((one.module, self._aim(one)) for one in todo)

    def _has_plan(self, matrix: Matrix) -> bool:
        return self._plans is None or matrix.module in self._plans

    def finish(self) -> LayerCodes:
        """As `LayerWork.finish`."""
        tensors = unquantized(self._matrices, self._folded)
        tensors |= {f"{one.module}.weight": self._aim(one) for one in self._matrices if not self._has_plan(one)}
        kept = {f"{module}.columns": scale for module, scale in self.columns.items()}
        kept |= {f"{module}.rows": scale for module, scale in self.rows.items()}
        return LayerCodes(dict(self._codes), tensors, dict(self._records), kept)

    def folded_statistics(self, stack: Stack, stats: Statistics, owned: bool) -> Statistics:
        """The source's statistics as they are of inputs divided by the feed's scale."""
        scale = self._columns(stack)
        gram = scaling.scale_gram(stats.gram, scale, in_place=owned)
        return replace(stats, gram=gram, abs_sum=stats.abs_sum / scale)

    def _columns(self, stack: Stack) -> Tensor:
        """``[in]``, or ``[E, in]`` of experts."""
        scales = [self.columns[problem[0].module] for problem in stack.problems]
        return torch.stack(scales) if stack.routed else scales[0]

    def _aim(self, matrix: Matrix) -> Tensor:
        weight = matrix.of(self._weights[matrix.tensor]).float() * self.columns[matrix.module]
        return weight.div_(self.rows[matrix.module].unsqueeze(1))

    def _originals(self, stack: Stack) -> Tensor:
        """The source's weights of each problem below each other, ``[out, in]`` or ``[E, out, in]``."""
        found = [
            torch.cat([matrix.of(self._weights[matrix.tensor]) for matrix in problem]) for problem in stack.problems
        ]
        return torch.stack(found) if stack.routed else found[0]

    def _scale(self, feed: Feed, fed: Sequence[tuple[Stack, Statistics]]) -> None:
        """Search the scale of a feed, one for all stacks of it, and fold it."""
        if feed.producer == Nothing():
            return
        parts = [Weighed(self._originals(stack), stats.gram, stats.counted) for stack, stats in fed]
        mean_abs = fed[0][1].overall_abs
        columns = mean_abs.shape[0]
        tie = feed.producer.ties(columns, mean_abs.device)
        search = scaling.search_scale(parts, mean_abs, self._spec(fed[0][0], columns), tie, self._crew)
        if search.scale is not None:
            self._fold(feed, search.scale, tie)

    def _scale_each(self, stack: Stack, stats: Statistics) -> None:
        """Search the scale of each expert's own input, and fold it."""
        if stack.feeds[0].producer == Nothing():
            return
        spec = self._spec(stack, stats.gram.shape[-1])
        experts = Weighed(self._originals(stack), stats.gram)
        scales = scaling.search_own_scales(experts, stats.mean_abs, spec, self._crew)
        for feed, scale in zip(stack.feeds, scales, strict=True):
            self._fold(feed, scale, None)

    def _fold(self, feed: Feed, scale: Tensor, tie: Tensor | None) -> None:
        """Divide the producer of a feed by a scale ``[in]``; the columns that it feeds get what the producer, as
        stored, leaves over.

        Norms, biases and the tensors that only take the scale are folded here; rows and columns of matrices are noted
        and applied when they are rounded.
        """
        folded = self._folded
        match feed.producer:
            case Norm(name, plus_one):
                weight, bias = f"{name}.weight", f"{name}.bias"
                own = scaling.untied(scale, tie, folded[weight].shape[0])
                dtype = self._method.spec.dtype
                folded[weight], own = scaling.fold_norm(folded[weight], own, dtype, 1.0 if plus_one else 0.0)
                scale = own if tie is None else own[tie]
                if bias in folded:
                    folded[bias] = folded[bias] / own
            case Rows(matrix) | Heads(matrix):
                rows, bias = feed.producer.part(self.rows[matrix.module]), f"{matrix.module}.bias"
                rows.copy_(scaling.untied(scale, tie, rows.shape[0]))
                if bias in folded:
                    folded[bias] = self._weights[bias].float() / self.rows[matrix.module]
            case Nothing():
                return
        for name in feed.also:
            folded[name] = folded[name].float() * scale
        for matrix in feed.consumers:
            self.columns[matrix.module] = scale
            self._scaled.add(matrix.module)

    def round(self, stack: Stack, stats: Statistics) -> None:
        """Choose codes for the consumers of each problem together (they share the Gram matrix) and record for each the
        relative output errors ``|(W - Ŵ) Xᵀ| / |W Xᵀ|`` of plain rounding and of the result, and ``|W - Ŵ| / |W|``."""
        if not self.quantizes(stack):
            return
        if isinstance(stats, InputStatistics):
            self._round(stack, stats, [{}])
            return
        for start in range(0, len(stack.problems), scaling.AT_ONCE):
            some = slice(start, start + scaling.AT_ONCE)
            part = stats.part(some)
            self._round(stack.part(some), part, part.figures())

    def _round(self, stack: Stack, stats: Statistics, figures: Sequence[Mapping[str, float]]) -> None:
        method, target, scale = self._method, self.target(stack), self._columns(stack)
        spec = self._spec(stack, scale.shape[-1])
        rounded, damp = _rounded(method, target, stats, spec, self._crew)
        sizes = [self.rows[matrix.module].shape[0] for matrix in stack.problems[0]]
        parts = zip(
            zip(*stack.problems, strict=True), target.split(sizes, -2), rounded.codes.split(sizes, -2),
            rounded.grid.scale.split(sizes, -2), rounded.grid.zero.split(sizes, -2), strict=True,
        )  # fmt: skip
        for matrices, wanted, codes, scales, zeros in parts:
            grid = grids.Grid(scales, zeros)
            sources = [matrix.of(self._weights[matrix.tensor]).float() for matrix in matrices]
            rows = [self.rows[matrix.module] for matrix in matrices]
            source, row = (torch.stack(sources), torch.stack(rows)) if stack.routed else (sources[0], rows[0])
            error = grids.dequantize(codes, grid, spec).sub_(wanted).mul_(row.unsqueeze(-1))
            records = records_of(source, error, method.rounding == "rtn", stats.gram, scale, spec, self._crew)
            each = zip(*(part if stack.routed else [part] for part in (codes, scales, zeros)), strict=True)
            for matrix, record, one, figure, (own, *fitted) in zip(matrices, records, damp, figures, each, strict=True):
                self._codes[matrix.module] = grids.to_codes(own, grids.Grid(*fitted), spec)
                self._records[matrix.module] = {**record, "damp": one, **figure}


def _rounded(
    method: OnGrid, target: Tensor, stats: Statistics, spec: GridSpec, crew: Crew
) -> tuple[rounding.Rounded, Sequence[float]]:
    """(codes of ``target [out, in]`` or ``[E, out, in]``, the damping that each took). ``stats``: used up. Every member
    of the crew rounds its pieces, and has all at the end."""
    gram = stats.gram
    if method.rounding == "rtn":
        blocks = grids.diagonal_blocks(gram, spec.group_size) if method.clip else None
        fitted = grids.fit_minmax(target, spec) if blocks is None else grids.fit_clipped(target, blocks, spec)
        problems = len(gram) if gram.ndim == 3 else 1
        return rounding.Rounded(grids.quantize(target, fitted, spec), fitted), [0.0] * problems
    order = rounding.activation_order(gram) if method.act_order else None
    factor = rounding.factorize(gram, method.damp_percent, order)
    pieces = Pieces.of(crew, target, method.descent and _in_groups(factor, spec))
    part = pieces.take(target)
    if stats.drift is None:
        goal = part.clone()
    else:
        with tensor_float32():
            drift, stats.drift = stats.output_drift(part, pieces), None  # large, and not needed again
            goal = rounding.propagated_target(part, drift, factor, method.propagate_strength)
        del drift
    damp = factor.damp.view(-1).tolist()
    if not method.descent:
        return rounding.gptq(goal, factor, spec, method.clip, gram), damp
    own = _descend(method, goal, factor, gram, spec)
    if pieces.number == 1:
        return own, damp
    codes = pieces.whole(own.codes.to(torch.uint8)).float()
    return rounding.Rounded(codes, grids.Grid(pieces.whole(own.grid.scale), pieces.whole(own.grid.zero))), damp


def _in_groups(factor: rounding.Factor, spec: GridSpec) -> bool:
    """Whether descent begins by itself, not with GPTQ's codes."""
    return factor.order is None and spec.group_size <= descent.BLOCK


def tried(method: OnGrid, weight: Tensor, gram: Tensor, factor: rounding.Factor, spec: GridSpec) -> Tensor:
    """``weight [out, in]``, or some rows of it, as ``method`` rounds it, nothing folded: float32. ``factor``: of
    ``gram``, in the columns' order. Of a stack ``[E, …]`` each."""
    goal, spec = weight.float().clone(), spec.for_columns(weight.shape[-1])
    if method.descent:
        rounded = _descend(method, goal, factor, gram, spec)
    else:
        rounded = rounding.gptq(goal, factor, spec, method.clip, gram)
    return grids.dequantize(rounded.codes, rounded.grid, spec)


def _descend(method: OnGrid, goal: Tensor, factor: rounding.Factor, gram: Tensor, spec: GridSpec) -> rounding.Rounded:
    """Scales and codes by descent, from one pass in the columns' order; with act-order, and where a row is one group,
    from GPTQ's codes. ``gram``: damped as the factor is, and put back."""
    levels = Levels.of_grid(spec, method.signed)
    if _in_groups(factor, spec):
        begun = descent.begin(goal, factor, levels)
    else:
        plain = rounding.gptq(goal.clone(), factor, spec, method.clip, gram)
        begun = Chosen(grids.minus_zeros(plain.codes, plain.grid), plain.grid.scale, plain.grid.zero)
    with rounding.damped(gram, factor):
        chosen = descent.descend(goal, begun, gram, levels)
    return rounding.Rounded(chosen.codes(), chosen.grid)
