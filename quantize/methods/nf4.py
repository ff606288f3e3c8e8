"""NF4 in bitsandbytes' blocks: by its own kernels, or with scales and codes that make up for each other's errors.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314. A block's scale need not be its
largest magnitude, and a code need not be the nearest: ../descent.py chooses both for the inputs that will come, in the
same bytes that bitsandbytes reads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qtool import QtoolError
from qtool.convert.formats import bnb_nf4
from qtool.convert.formats.codes import Nested, Nf4Blocks
from qtool.convert.formats.plan import ModelShape
from qtool.convert.formats.shards import Shards
from qtool.quantize import descent
from qtool.quantize.chosen import Chosen, Levels
from qtool.quantize.crew import SOLO, Crew, Pieces
from qtool.quantize.methods.budget import Budget
from qtool.quantize.methods.method import (
    SKIPPED,
    Inputs,
    Layer,
    LayerCodes,
    LayerWork,
    Method,
    Name,
    Needs,
    Statistics,
    UnfoldedWork,
)
from qtool.quantize.methods.number import Number
from qtool.quantize.methods.two_kinds import WHOLE, alike_of, changes_of, offers_of, require_one_rule
from qtool.quantize.precision import tensor_float32
from qtool.quantize.rounding import Factor, damped, factorize, propagated_target
from qtool.quantize.scaling import output_error
from qtool.quantize.stacks import Stack, stacks_of

INSTALL = "pip install 'qtool-llm[nf4]'"


class Nf4Method(Method):
    """NF4 for bitsandbytes. What is not quantized keeps the source's dtype.

    ``rounding: absmax`` leaves all to bitsandbytes and needs no calibration; ``descent`` chooses on Gram matrices.
    """

    short: ClassVar[Mapping[str, Mapping[str, Any]]] = {"nf4": {}}

    method: Literal["nf4"]
    """NF4, bitsandbytes' format."""
    name: Name = "nf4"
    """Of the output: its folder's name ends so."""
    double_quant: bool = True
    """Scales are quantized, too."""
    blocksize: Literal[64] = 64
    """Weights that share a scale."""
    rounding: Literal["descent", "absmax"] = "descent"
    """`descent` chooses on the text; `absmax` is bitsandbytes' own, without calibration."""
    damp_percent: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """Part of the Gram matrix's mean diagonal that is added to it."""
    propagate_error: bool = True
    """Round against the inputs that the quantized prefix produces."""
    propagate_strength: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """How much of the prefix's error a matrix makes up for."""
    budget: Budget | None = None
    """How large the weights may be: each linear gets four bits, or stays in 16."""

    @model_validator(mode="after")
    def _one_rule(self) -> Nf4Method:
        require_one_rule(self, self.budget)
        return self

    def decided(self, mix: Mapping[str, str]) -> Nf4Method:
        """What stays in 16 bits, by name."""
        return self.model_copy(update=changes_of(mix))

    def offers(self, shape: ModelShape) -> dict[str, dict[str, int]]:
        """As `Method.offers`: four bits and sixteen."""
        return offers_of(self.model_copy(update={"budget": None}), shape)

    def alike(self, shape: ModelShape) -> tuple[tuple[str, ...], ...]:
        """As `two_kinds.alike_of`."""
        return alike_of(shape)

    def trial(self, weight: Tensor, type_name: str, gram: Tensor | None, factor: Factor | None) -> Tensor:
        """As `Method.trial`."""
        if type_name == WHOLE or gram is None:
            return weight.float()
        if factor is None or weight.shape[-1] % self.blocksize:
            rows = weight.flatten(0, -2)
            return quantize_nf4(rows, self.blocksize, self.double_quant).dequantize().float().view_as(weight)
        goal, levels = weight.float(), levels_of(self.blocksize)
        begun = descent.begin(goal, factor, levels)
        with damped(gram, factor):
            sizes, whole = [weight.shape[-2]], Pieces(SOLO, 1)
            return _descend(self.double_quant, goal, begun, gram, levels, sizes, whole)[0].weights()

    @property
    def compensates(self) -> bool:
        """Only by descent."""
        return self.rounding != "absmax"

    @property
    def needs(self) -> Needs:
        """Largest magnitudes ask no text."""
        if self.rounding == "absmax":
            return Needs.NOTHING
        return Needs.OWN_STREAM if self.propagate_error else Needs.GRAM

    def workspace(self, out: int, columns: int) -> int:
        """As other methods that compensate, and the source's own weights."""
        if not self.needs.gram:
            return 0
        weights = out * columns
        return weights // 2 + max(3 * columns**2 + weights, columns**2 + descent.workspace(out, columns))

    @property
    def container(self) -> Shards:
        """bitsandbytes'."""
        return Shards(bnb_nf4.quantization_config(self.double_quant, SKIPPED), None, self.blocksize, self.asked)

    @property
    def packages(self) -> tuple[str, ...]:
        """Its kernels choose the codes."""
        return ("bitsandbytes",)

    def require(self, device: torch.device) -> None:
        """Raises QtoolError (exit 3)."""
        load_bitsandbytes()

    def quantize(self, layer: Layer, inputs: Inputs) -> LayerCodes:
        """In the dtype of the checkpoint; one matrix at a time is on the device. By largest magnitudes, only
        ``|W - Ŵ| / |W|`` is recorded."""
        if self.needs.gram:
            work = Nf4Work(self, layer, inputs.crew)
            for stack in stacks_of(layer.feeds):
                work.round(stack, inputs.statistics[stack.name])
            return work.finish()
        output = LayerCodes(tensors=layer.others)
        for matrix in layer.matrices:
            weight = layer.source(matrix)
            blocks = quantize_nf4(weight, self.blocksize, self.double_quant)
            output.codes[matrix.module] = blocks
            output.records[matrix.module] = {"frobenius": _figure(_distance(weight.float(), blocks))}
        return output

    def begin(self, layer: Layer, inputs: Inputs) -> LayerWork:
        """Nothing is folded."""
        return Nf4Work(self, layer, inputs.crew)


class Nf4Work(UnfoldedWork):
    """Records ``|W - Ŵ| / |W|`` and the relative output errors of bitsandbytes' own codes and of these."""

    def __init__(self, method: Nf4Method, layer: Layer, crew: Crew) -> None:
        super().__init__(layer, crew)
        self._method = method

    def _round(self, stack: Stack, stats: Statistics, figures: Sequence[Mapping[str, float]]) -> None:
        chosen = self._choose(stack, stats)
        grams = stats.gram if stack.routed else [stats.gram]
        for problem, own, gram, figure in zip(stack.problems, chosen, grams, figures, strict=True):
            for matrix, (source, blocks) in zip(problem, own, strict=True):
                self.done.codes[matrix.module] = blocks
                self.done.records[matrix.module] = {**self._record(source, blocks, gram), **figure}

    def _choose(self, stack: Stack, stats: Statistics) -> list[list[tuple[Tensor, Nf4Blocks]]]:
        """Of each problem its matrices' sources and blocks. Rows that end inside a block share it with the next:
        bitsandbytes' own codes."""
        method = self._method
        sources = [[self.layer.source(matrix) for matrix in problem] for problem in stack.problems]
        if sources[0][0].shape[1] % method.blocksize:
            return [
                [(source, quantize_nf4(source, method.blocksize, method.double_quant)) for source in own]
                for own in sources
            ]
        target = self.target(stack)
        factor = factorize(stats.gram, method.damp_percent)
        pieces = Pieces.of(self.crew, target)
        goal = pieces.take(target)
        if stats.drift is not None:
            with tensor_float32():
                goal = propagated_target(goal, stats.output_drift(goal, pieces), factor, method.propagate_strength)
        levels = levels_of(method.blocksize)
        begun = descent.begin(goal, factor, levels)
        with damped(stats.gram, factor):
            rows = [own.shape[0] for own in sources[0]]
            chosen, maxima = _descend(method.double_quant, goal, begun, stats.gram, levels, rows, pieces)
        sizes = [own.shape[0] for problem in sources for own in problem]
        parts = iter(zip(pieces.whole(chosen.levels).flatten(0, -2).split(sizes), maxima, strict=True))
        found = []
        for own in sources:
            each = zip(own, parts, strict=False)  # as many of the parts as this problem has matrices
            found.append([(one, _blocks(one, codes, *scales, method.blocksize)) for one, (codes, scales) in each])
        return found

    def _record(self, source: Tensor, blocks: Nf4Blocks, gram: Tensor) -> dict[str, float]:
        wide, method = source.float(), self._method
        plain = quantize_nf4(source, method.blocksize, method.double_quant).dequantize().sub_(wide)

        def whole() -> Tensor:
            with tensor_float32():
                return output_error(wide, gram).clamp_min(1e-30)

        def rounded() -> Tensor:
            with tensor_float32():
                return output_error(plain, gram)

        def compensated() -> Tensor:  # its terms cancel: in float32
            return output_error(blocks.dequantize().sub_(wide), gram)

        energy, *losses = self.crew.figures([whole, rounded, compensated], gram[0, 0])
        rtn, own = ((loss.clamp_min(0) / energy).sqrt() for loss in losses)
        return {"rtn_error": _figure(rtn), "error": _figure(own), "frobenius": _figure(_distance(wide, blocks))}


def levels_of(blocksize: int) -> Levels:
    """NF4's sixteen."""
    return Levels(15, blocksize, torch.float32, table=bnb_nf4.NF4)


def _descend(
    double_quant: bool, goal: Tensor, begun: Chosen, gram: Tensor, levels: Levels, sizes: Sequence[int], pieces: Pieces
) -> tuple[Chosen, list[tuple[Tensor, Nested | None]]]:
    """(what is chosen for these pieces, each matrix's scales as they are stored). ``sizes``: rows of the matrices of a
    problem; ``pieces``: which rows of them ``goal`` and ``begun`` are."""
    problems = goal.shape[0] if pieces.number == 1 and goal.ndim == 3 else 1
    rows = list(sizes) * problems
    if not double_quant:
        chosen = descent.descend(goal, begun, gram, levels)
        scales = pieces.whole(chosen.scale)
        return chosen, [(scale.flatten(), None) for scale in scales.flatten(0, -2).split(rows)]
    # scales are rounded once they are good, then codes make up for that
    begun = descent.descend(goal, begun, gram, levels, sweeps=1)
    found = pieces.whole(begun.scale)
    nested = [_nested(scale) for scale in found.flatten(0, -2).split(rows)]
    scales = torch.cat([scale for scale, _, _ in nested]).view_as(found)
    begun = Chosen(begun.levels, pieces.take(scales), begun.zero)
    chosen = descent.descend(goal, begun, gram, levels, sweeps=2, scales=False)
    return chosen, [(absmax, second) for _, absmax, second in nested]


def _distance(source: Tensor, blocks: Nf4Blocks) -> Tensor:
    """``|W - Ŵ| / |W|``."""
    distance: Tensor = blocks.dequantize().sub_(source).norm() / source.norm().clamp_min(1e-30)
    return distance


def _figure(value: Tensor) -> float:
    return float(f"{float(value):.6g}")


def _nested(scale: Tensor) -> tuple[Tensor, Tensor, Nested]:
    """Scales ``[out, blocks of a row]`` in eight bits, as bitsandbytes' quantize_4bit stores largest magnitudes:
    (what a reader makes of them, uint8 ``[blocks]``, the rest)."""
    functional = load_bitsandbytes()
    offset = scale.mean()
    absmax, state = functional.quantize_blockwise(scale.flatten() - offset, blocksize=bnb_nf4.NESTED_BLOCK)
    nested = Nested(state.absmax, state.code, state.blocksize, float(offset))
    read = Nf4Blocks(absmax, absmax, state.code, (1, 1), 1, torch.float32, nested).block_maxima()
    return read.view_as(scale), absmax, nested


def _blocks(source: Tensor, levels: Tensor, absmax: Tensor, nested: Nested | None, blocksize: int) -> Nf4Blocks:
    """``levels [out, in]``: values of the table."""
    table = levels.new_tensor(bnb_nf4.NF4)
    codes = torch.bucketize(levels.flatten(), (table[1:] + table[:-1]) / 2).to(torch.uint8)
    packed = (codes[0::2] << 4 | codes[1::2]).unsqueeze(1)
    out, columns = source.shape
    return Nf4Blocks(packed, absmax, table, (out, columns), blocksize, source.dtype, nested)


def load_bitsandbytes() -> Any:
    """`bitsandbytes.functional`. Raises QtoolError (exit 3) with the command that installs it."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an inference kernel that is not needed
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise QtoolError(f"method nf4 needs bitsandbytes, which is not installed here. Run: {INSTALL}", 3) from error
    return functional


def quantize_nf4(weight: torch.Tensor, blocksize: int, double_quant: bool) -> Nf4Blocks:
    """A linear ``[out, in]`` in float16, bfloat16 or float32 -> its blocks; the dtype is part of the result, because a
    reader dequantizes to it."""
    functional = load_bitsandbytes()
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
    )
    nested = None
    if double_quant:
        second = state.state2
        nested = Nested(second.absmax, second.code, second.blocksize, float(state.offset))
    out, columns = weight.shape
    return Nf4Blocks(packed, state.absmax, state.code, (out, columns), blocksize, weight.dtype, nested)
