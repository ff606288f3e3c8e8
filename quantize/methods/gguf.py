"""llama.cpp's block formats: each matrix in the type that the plan gives it, by ggml's own search with its columns
weighed by importance, or with blocks that make up for each other's errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from qtool import QtoolError
from qtool.convert.files.writer import Spec
from qtool.convert.formats.gguf.format import Gguf
from qtool.convert.formats.gguf.ggml import FLOATS, GgmlBlocks, load_gguf
from qtool.convert.formats.gguf.plan import offers
from qtool.convert.formats.plan import LinearPlan, ModelShape
from qtool.convert.models.feeds import Matrix
from qtool.quantize.crew import Crew, Pieces
from qtool.quantize.methods import kquant_rounding
from qtool.quantize.methods.budget import Budget
from qtool.quantize.methods.ggml import fits, live, load_library, quantize_ggml, quantizer_package
from qtool.quantize.methods.method import (
    Inputs,
    Layer,
    LayerCodes,
    LayerWork,
    Method,
    Name,
    Needs,
    Pattern,
    Statistics,
    UnfoldedWork,
)
from qtool.quantize.methods.number import Number
from qtool.quantize.precision import tensor_float32
from qtool.quantize.rounding import Factor, damped, factorize, propagated_target
from qtool.quantize.scaling import output_error
from qtool.quantize.stacks import Stack, stacks_of

IMPORTANCE = "importance"
UNWEIGHED = ("Q8_0", *FLOATS)  # types whose blocks no importance changes
# What a budget chooses from, beside eight and sixteen bits: where 256 divides a row, and where it does not.
SUPER_BLOCKS = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K")
SHORT_BLOCKS = ("IQ4_NL", "Q5_0", "Q5_1")
FileType = Literal["Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0", "F16", "BF16"]
MixedType = Literal["Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"]


class TensorSettings(BaseModel):
    """Of the tensors that a pattern names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: MixedType
    """In llama.cpp's words."""


class GgufMethod(Method):
    """A .gguf file for llama.cpp, each tensor in the type that llama.cpp's own rules give it.

    ``imatrix``: weigh errors by the mean square of each input channel over the calibration text (true), by a file that
    llama.cpp's llama-imatrix made (its path), or by nothing but the weights (false).
    ``rounding``: ``descent`` chooses blocks on Gram matrices of the text, ``ggml`` leaves them to ggml's own search.
    By default descent where the text weighs the columns, else (``imatrix`` false or a file, Q8_0, floats) ggml.
    """

    short: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"name": name, "type": name} for name in get_args(FileType)
    }

    method: Literal["gguf"]
    """A .gguf file for llama.cpp and Ollama."""
    name: Name = "gguf"
    """Of the output: its folder's name ends so."""
    type: FileType = "Q4_K_M"
    """Of the file, in llama.cpp's words."""
    imatrix: bool | Annotated[str, Field(min_length=1)] = True
    """Weigh errors by the text (true), by nothing (false), or by a file of llama-imatrix (its path)."""
    rounding: Literal["descent", "ggml"] | None = None
    """`descent` lets blocks make up for each other; `ggml` is llama.cpp's own search. Left out: as `imatrix` allows."""
    budget: Budget | None = None
    """How large the file may be, in place of `type`: each matrix gets a type of its own."""
    mix: dict[str, MixedType] | None = None
    """Module to type, in place of `type`: what a budget became. `qtool.json` of an artifact has it."""
    damp_percent: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """Part of the Gram matrix's mean diagonal that is added to it."""
    propagate_error: bool = True
    """Round against the inputs that the quantized prefix produces."""
    propagate_strength: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """How much of the prefix's error a matrix makes up for."""
    modules: dict[Pattern, TensorSettings] = Field(default_factory=dict)
    """Tensors with a type of their own, by name or pattern; of several that name one the last counts."""
    pre_tokenizer: str | None = None  # llama.cpp's name of the split rules, where qtool cannot tell it
    """llama.cpp's name of the rules that split text, where qtool cannot tell it."""

    @model_validator(mode="after")
    def _text_for_descent(self) -> GgufMethod:
        if self.rounding == "descent" and not self._weighed_by_text:
            raise ValueError(f"descent needs `imatrix: true` and a type other than {', '.join(UNWEIGHED)}")
        return self

    @model_validator(mode="after")
    def _one_rule(self) -> GgufMethod:
        mixed = "budget" if self.budget is not None else "mix" if self.mix is not None else None
        if mixed and "type" in self.model_fields_set:
            raise ValueError(f"`type` and `{mixed}` both say which types matrices get; leave one out")
        if self.budget is not None and self.mix is not None:
            raise ValueError("`mix` and `budget` both say which types matrices get; leave one out")
        if mixed and (other := "ignore" if self.ignore else "modules" if self.modules else None):
            raise ValueError(f"`{other}` and `{mixed}` both say which types matrices get; leave one out")
        return self

    def unsaid(self) -> set[str]:
        """A file of one rule says nothing of mixes, and a mixed one has no type."""
        return super().unsaid() | ({"mix"} if self.mix is None else set()) | ({"type"} if self._mixed else set())

    @property
    def _weighed_by_text(self) -> bool:
        return self.imatrix is True and (self._mixed or self.type not in UNWEIGHED)

    @property
    def _mixed(self) -> bool:
        return self.budget is not None or self.mix is not None

    @property
    def undecided(self) -> Budget | None:
        """As `Method.undecided`."""
        return self.budget if self.mix is None else None

    def decided(self, mix: Mapping[str, str]) -> GgufMethod:
        """As `Method.decided`."""
        return self.model_copy(update={"mix": dict(mix)})

    def offers(self, shape: ModelShape) -> dict[str, dict[str, int]]:
        """As `Method.offers`: block types, and the 16 bits that lose nothing."""
        whole = "BF16" if all(info.dtype == torch.bfloat16 for info in shape.tensors.values()) else "F16"
        return offers(shape, [*SUPER_BLOCKS, "Q8_0", whole], [*SHORT_BLOCKS, "Q8_0", whole])

    def trial(self, weight: Tensor, type_name: str, gram: Tensor | None, factor: Factor | None) -> Tensor:
        """As `Method.trial`."""
        if gram is None:
            return quantize_ggml(weight, type_name).dequantize()
        if factor is None and weight.ndim == 3:
            return torch.stack([self.trial(one, type_name, row, None) for one, row in zip(weight, gram, strict=True)])
        if factor is None:
            return quantize_ggml(weight, type_name, live(gram)).dequantize()
        with damped(gram, factor):
            return kquant_rounding.quantize(weight.float(), factor, gram, type_name).dequantize().view_as(weight)

    @property
    def compensates(self) -> bool:
        """Only by descent."""
        return self.rounding != "ggml"

    @property
    def needs(self) -> Needs:
        """Nothing of the text, where no block depends on it; else its importance matrix or Gram matrices."""
        if not self._weighed_by_text:
            return Needs.NOTHING
        if self.rounding == "ggml":
            return Needs.CHANNELS
        return Needs.OWN_STREAM if self.propagate_error else Needs.GRAM

    def workspace(self, out: int, columns: int) -> int:
        """As other methods that compensate."""
        if not self.needs.gram:
            return 0
        weights = out * columns
        return weights // 2 + max(3 * columns**2 + weights, columns**2 + kquant_rounding.workspace(out, columns))

    @property
    def container(self) -> Gguf:
        """llama.cpp's file."""
        return Gguf(self.type, self.pre_tokenizer, self.asked, self.mix)

    @property
    def packages(self) -> tuple[str, ...]:
        """The file's writer, and the C code that chooses the codes."""
        return ("gguf", *quantizer_package())

    @property
    def kept_as(self) -> str | None:
        """The rows that the blocks were weighed by, where qtool measured them."""
        return IMPORTANCE if self.calibrated else None

    def kept_specs(self, matrices: Sequence[LinearPlan]) -> dict[str, Spec]:
        """Mean squares of each matrix's input channels."""
        return {matrix.name: (torch.float32, (matrix.columns,)) for matrix in matrices}

    @property
    def importance_file(self) -> str | None:
        """As `imatrix` names it."""
        return self.imatrix if isinstance(self.imatrix, str) else None

    def require(self, device: torch.device) -> None:
        """Raises QtoolError (exit 3)."""
        load_gguf()
        if self._mixed or ((self.type not in FLOATS or self.modules) and device.type == "cpu"):
            load_library()

    def quantize(self, layer: Layer, inputs: Inputs) -> LayerCodes:
        """Records ``|W - Ŵ| / |W|`` and, where importance is known, the same with every column weighed by it: the
        relative output error on inputs whose channels are uncorrelated. Nothing is recorded outside the layers."""
        if self.needs.gram and layer.index is not None:
            work = GgufWork(self, layer, inputs.crew)
            for stack in stacks_of(layer.feeds):
                work.round(stack, inputs.statistics[stack.name])
            return work.finish()
        output = LayerCodes(tensors=layer.others)
        for matrix in layer.matrices:
            module, weight, kind = fitting(layer, matrix)
            given = inputs.importance.get(module)
            row = None if given is None else live(given.to(layer.device))
            blocks = quantize_ggml(weight, kind, row)
            output.codes[module] = blocks
            if given is not None and self.kept_as:
                output.kept[module] = given.float().cpu()
            if layer.index is None:
                continue
            source = weight.float()
            error = blocks.dequantize().sub_(source).square_()
            power = source.square_()
            output.records[module] = {"frobenius": _ratio(error, power), **inputs.figures.get(module, {})}
            if row is not None:
                output.records[module]["weighted_error"] = _ratio(error * row, power * row)
        return output

    def begin(self, layer: Layer, inputs: Inputs) -> LayerWork:
        """Nothing is folded."""
        return GgufWork(self, layer, inputs.crew)

    def remarks(self, ledger: Mapping[str, Mapping[str, float]]) -> list[str]:
        """What a named importance matrix does not hold."""
        without = [linear for linear, record in ledger.items() if "weighted_error" not in record]
        if self.importance_file is None or not without:
            return []
        return [f"{len(without)} of {len(ledger)} linears have no row in the importance matrix: {without[0]} first"]


class GgufWork(UnfoldedWork):
    """Records ``|W - Ŵ| / |W|`` and the relative output errors of ggml's own blocks and of these."""

    def __init__(self, method: GgufMethod, layer: Layer, crew: Crew) -> None:
        super().__init__(layer, crew)
        self._method = method

    def _round(self, stack: Stack, stats: Statistics, figures: Sequence[Mapping[str, float]]) -> None:
        sources = [[fitting(self.layer, matrix) for matrix in problem] for problem in stack.problems]
        chosen = self._choose(stack, sources, stats)
        grams, rows = (part if stack.routed else [part] for part in (stats.gram, stats.mean_square))
        for own, blocks, gram, row, figure in zip(sources, chosen, grams, rows, figures, strict=True):
            weighed = live(row)
            for (module, source, kind), one in zip(own, blocks, strict=True):
                self.done.codes[module] = one
                self.done.kept[module] = row.cpu()
                plain = quantize_ggml(source, kind, weighed)
                self.done.records[module] = {**_record(source.float(), plain, one, gram, self.crew), **figure}

    def _choose(
        self, stack: Stack, sources: Sequence[Sequence[tuple[str, Tensor, str]]], stats: Statistics
    ) -> list[list[GgmlBlocks]]:
        """Of each problem its matrices' blocks, those of one type together; experts have the same types."""
        sizes, kinds = [source.shape[0] for _, source, _ in sources[0]], [kind for _, _, kind in sources[0]]
        goal, gram, problems = self.target(stack), stats.gram, len(sources)
        source = goal
        factor = factorize(gram, self._method.damp_percent)
        if stats.drift is not None:  # every member of the crew works out all: two products, and kinds are no pieces
            with tensor_float32():
                drift = stats.output_drift(goal)
                goal = propagated_target(goal, drift, factor, self._method.propagate_strength)
        found = dict[tuple[int, int], GgmlBlocks]()
        goal_or_source = goal.split(sizes, -2), source.split(sizes, -2)  # what stays in 16 bits makes up for nothing
        with damped(gram, factor):
            for kind in dict.fromkeys(kinds):
                places = [place for place, one in enumerate(kinds) if one == kind]
                aims = goal_or_source[kind in FLOATS]
                wanted = torch.cat([aims[place] for place in places], -2)
                pieces = Pieces.of(self.crew, wanted)
                blocks = kquant_rounding.quantize(pieces.take(wanted), factor, gram, kind)
                data = pieces.below(blocks.data)
                parts = iter(data.split([sizes[place] for place in places] * problems))
                for number, place in product(range(problems), places):
                    found[number, place] = GgmlBlocks(next(parts), kind, (sizes[place], wanted.shape[-1]))
        return [[found[number, place] for place in range(len(sizes))] for number in range(problems)]


def fitting(layer: Layer, matrix: Matrix) -> tuple[str, Tensor, str]:
    """(module, its weights, their type). Raises QtoolError where the type cannot hold them."""
    module, weight = matrix.module, layer.source(matrix)
    kind = layer.plans[module].type
    if not fits(weight, kind):
        raise QtoolError(f"{module}: does not fit {kind}, which ends at 65504; set `type: BF16`.")
    return module, weight, kind


def _ratio(error: Tensor, power: Tensor) -> float:
    return float(f"{float((error.sum() / power.sum().clamp_min(1e-30)).sqrt()):.6g}")


def _record(source: Tensor, plain: GgmlBlocks, blocks: GgmlBlocks, gram: Tensor, crew: Crew) -> dict[str, float]:
    error = blocks.dequantize().sub_(source)
    energy, *losses = crew.figures(
        [
            lambda: output_error(source, gram).clamp_min(1e-30),
            lambda: output_error(plain.dequantize().sub_(source), gram),
            lambda: output_error(error, gram),
        ],
        gram[0, 0],
    )
    figures = [*((loss.clamp_min(0) / energy).sqrt() for loss in losses), error.norm() / source.norm().clamp_min(1e-30)]
    rtn, own, frobenius = (float(f"{float(figure):.6g}") for figure in figures)
    return {"rtn_error": rtn, "error": own, "frobenius": frobenius}
