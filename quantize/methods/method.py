"""What a method is: a section of a recipe that turns a decoder layer into codes, and says what it must know for it.

A method is one module: its keys (they keep their public names), its function, its needs; table.py names them all.
tests/test_additions.py adds one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from qtool.convert.files.writer import Spec
from qtool.convert.formats.codes import Codes
from qtool.convert.formats.format import Format
from qtool.convert.formats.plan import LinearPlan, ModelShape
from qtool.convert.models.feeds import Feed, Matrix
from qtool.quantize.crew import SOLO, Crew, crews_of
from qtool.quantize.methods.budget import Budget
from qtool.quantize.rounding import Factor
from qtool.quantize.routed import RoutedStatistics
from qtool.quantize.scaling import AT_ONCE
from qtool.quantize.stacks import Stack
from qtool.quantize.statistics import InputStatistics

SKIPPED = ["lm_head"]  # never quantized
Statistics = InputStatistics | RoutedStatistics  # of a plain stack, of experts
# a folder's name ends at 255 bytes, and the model's stands in front of it
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


Pattern = Annotated[str, Field(min_length=1, max_length=300)]
Patterns = tuple[Pattern, ...]


class Needs(Enum):
    """What a method must know of each linear's inputs on the calibration text."""

    NOTHING = "nothing"
    CHANNELS = "channels"  # the mean square of each channel of the source's inputs
    GRAM = "gram"  # the Gram matrix of the source's inputs
    OWN_STREAM = "own stream"  # that of the inputs which its own quantized prefix produces, and their drift

    @property
    def gram(self) -> bool:
        """Whether Gram matrices are collected for it."""
        return self in (Needs.GRAM, Needs.OWN_STREAM)


@dataclass(frozen=True)
class Layer:
    """A decoder layer of the source; or one matrix outside of them, whose ``index`` is None. Names are below
    its prefix.

    feeds: its inputs and what they feed; matrices: what is to be quantized of it; plans: a matrix's module -> its plan;
    tensors: name -> tensor in the checkpoint's dtype, in host memory; weights: the same on ``device`` in the walk's
    dtype (only where Gram matrices are collected).
    """

    index: int | None
    feeds: tuple[Feed, ...]
    matrices: tuple[Matrix, ...]
    plans: Mapping[str, LinearPlan]
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    device: torch.device

    def source(self, matrix: Matrix) -> Tensor:
        """``[out, in]`` in the checkpoint's dtype, on the device."""
        return matrix.of(self.tensors[matrix.tensor]).to(self.device)

    @property
    def others(self) -> dict[str, Tensor]:
        """The tensors that are not to be quantized, in the checkpoint's dtype."""
        return unquantized(self.matrices, self.tensors)


def unquantized(matrices: Sequence[Matrix], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a layer's tensors that hold none of its matrices."""
    held = {matrix.tensor for matrix in matrices}
    return {name: tensor for name, tensor in tensors.items() if name not in held}


@dataclass(frozen=True)
class Inputs:
    """What a method asked for. statistics: a stack's name -> those of its input, used up to spare memory where
    ``owned``; crew: who rounds it together, each with the same inputs; importance: module -> mean square of its input
    channels ``[in]``; figures: module of an expert -> what its record says of its statistics."""

    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    owned: bool = False
    crew: Crew = SOLO
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass
class LayerCodes:
    """What one output keeps of one layer; names are relative to the layer.

    codes: matrix -> codes. tensors: every other tensor. records: matrix -> errors. kept: what the method writes beside
    the weights, name -> tensor as `Method.kept_specs` says.
    """

    codes: dict[str, Codes] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: dict[str, dict[str, float]] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def dequantized(self, dtype: torch.dtype, stored: torch.dtype, casts: Callable[[str], bool]) -> dict[str, Tensor]:
        """The layer's state dict as a reader of the artifact gets it. ``casts``: whether a tensor is stored in
        ``stored`` and computed with in ``dtype``."""
        state = {name: t.to(stored).to(dtype) if casts(name) else t for name, t in self.tensors.items()}
        return state | {f"{matrix}.weight": codes.dequantize(dtype) for matrix, codes in self.codes.items()}


class LayerWork(ABC):
    """A layer whose stacks get their codes one after the other, each on the inputs that those before it, as they are by
    then, produce."""

    @abstractmethod
    def target(self, stack: Stack) -> Tensor:
        """The weights of each problem below each other, float32 ``[out, in]``, of experts ``[E, out, in]``, with every
        scale that is folded."""

    def divisor(self, stack: Stack) -> Tensor | None:
        """What its input is divided by, against the source's, ``[in]`` or one of each expert ``[E, in]``; None: by
        nothing."""
        return None

    @abstractmethod
    def round(self, stack: Stack, stats: Statistics) -> None:
        """Choose the codes of its consumers, unless they stay in 16 bits. ``stats``: of the input as this layer's state
        produces it; used up."""

    @abstractmethod
    def finish(self) -> LayerCodes:
        """What has codes by now, and all other tensors."""

    def state(self, dtype: torch.dtype, stored: torch.dtype, casts: Callable[[str], bool]) -> dict[str, Tensor]:
        """The layer as it is now, as `LayerCodes.dequantized`: what has no codes yet is the source's."""
        done = self.finish()
        left = {f"{module}.weight": weight.to(dtype) for module, weight in self.left()}
        return left | done.dequantized(dtype, stored, casts)

    @abstractmethod
    def left(self) -> Iterator[tuple[str, Tensor]]:
        """(module, target) of each matrix without codes, one at a time: together they are large."""


class UnfoldedWork(LayerWork):
    """A layer whose weights and other tensors stay as they are; ``done``: what has codes by now."""

    def __init__(self, layer: Layer, crew: Crew) -> None:
        self.layer, self.crew, self.done = layer, crew, LayerCodes(tensors=layer.others)

    def target(self, stack: Stack) -> Tensor:
        """As `LayerWork.target`."""
        source = self.layer.source
        aims = [torch.cat([source(matrix).float() for matrix in problem]) for problem in stack.problems]
        return torch.stack(aims) if stack.routed else aims[0]

    def round(self, stack: Stack, stats: Statistics) -> None:
        """As `LayerWork.round`: some experts at a time."""
        if stack.problems[0][0] not in self.layer.matrices:
            return
        if isinstance(stats, InputStatistics):
            self._round(stack, stats, [{}])
            return
        for start in range(0, len(stack.problems), AT_ONCE):
            part = stats.part(slice(start, start + AT_ONCE))
            self._round(stack.part(slice(start, start + AT_ONCE)), part, part.figures())

    @abstractmethod
    def _round(self, stack: Stack, stats: Statistics, figures: Sequence[Mapping[str, float]]) -> None:
        """Of a plain stack, or of experts worked at once; ``figures``: what each problem's records hold, too."""

    def left(self) -> Iterator[tuple[str, Tensor]]:
        """As `LayerWork.left`."""
        layer, codes = self.layer, self.done.codes
        return ((one.module, layer.source(one)) for one in layer.matrices if one.module not in codes)

    def finish(self) -> LayerCodes:
        """As `LayerWork.finish`."""
        return self.done


class Method(BaseModel, ABC):
    """A section of a recipe's `outputs:`. Every child has the keys ``method`` and ``name``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    short: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Names that `qtool plan --format` takes -> the keys that they stand for."""
    grouped: ClassVar[bool] = False
    """Whether such a name may end with a group size (`awq-g64`)."""

    if TYPE_CHECKING:  # keys of every child, which keep their place among its own
        name: str

    ignore: Patterns = ()
    """Linears that stay in 16 bits, by name or pattern: `down_proj`, `model.layers.0.*`."""

    @model_serializer(mode="wrap")
    def _as_asked(self, others: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what nobody asked for: artifacts are known by this, and those made before a key existed stay so."""
        unsaid = self.unsaid()
        return {name: value for name, value in others(self).items() if name not in unsaid}

    def unsaid(self) -> set[str]:
        """Keys that say nothing as they are."""
        return {name for name in ("ignore", "modules", "budget") if not getattr(self, name, True)}

    @property
    def asked(self) -> dict[str, Any]:
        """What it wants otherwise of some linears, as formats take it: `ignore`, and `modules` where it has that."""
        return self.model_dump(mode="json", include={"ignore", "modules"})

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What the walk must collect for it."""

    @property
    @abstractmethod
    def container(self) -> Format:
        """How the codes are stored; a key of recipes is called `format`."""

    @abstractmethod
    def quantize(self, layer: Layer, inputs: Inputs) -> LayerCodes:
        """Codes of a layer. Raises QtoolError where the type of a matrix cannot hold it."""

    def begin(self, layer: Layer, inputs: Inputs) -> LayerWork:
        """A layer in the output's own stream, where that is what it needs. ``inputs``: the source's statistics, where
        `asks_source`."""
        raise NotImplementedError

    @property
    def asks_source(self) -> bool:
        """Whether `begin` takes the Gram matrices of the source's inputs."""
        return False

    @property
    def cost(self) -> int:
        """About what a layer takes, beside other outputs: ranks are dealt outputs by it."""
        costs = {Needs.NOTHING: 1, Needs.CHANNELS: 2, Needs.GRAM: 4, Needs.OWN_STREAM: 6}
        return costs[self.needs] + (2 if self.asks_source else 0)

    @property
    def calibrated(self) -> bool:
        """Whether the output depends on the calibration set."""
        return self.needs is not Needs.NOTHING

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """Of scales and of everything that is not quantized; None: each tensor keeps its own, or the format's."""
        return None

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions whose versions decide the bytes, beside those of every output."""
        return ()

    @property
    def kept_as(self) -> str | None:
        """What the file is called in which it keeps tensors beside the weights; None where it keeps none."""
        return None

    def kept_specs(self, matrices: Sequence[LinearPlan]) -> dict[str, Spec]:
        """Of those tensors."""
        return {}

    @property
    def undecided(self) -> Budget | None:
        """What its file may take, as long as its types are still to be chosen for that."""
        budget: Budget | None = getattr(self, "budget", None)  # a key of those that take one
        return budget

    def decided(self, mix: Mapping[str, str]) -> Method:
        """With the types that its matrices get: module -> type."""
        raise NotImplementedError

    def offers(self, shape: ModelShape) -> dict[str, dict[str, int]]:
        """Module -> type -> bytes, of every matrix that may be given one of several types."""
        raise NotImplementedError

    def alike(self, shape: ModelShape) -> tuple[tuple[str, ...], ...]:
        """Groups of modules that must get one type; a module that is in none is free."""
        return ()

    @property
    def compensates(self) -> bool:
        """Whether `trial` takes a factor, and of the Gram matrix more than its diagonal."""
        return True

    def trial(self, weight: Tensor, type_name: str, gram: Tensor | None, factor: Factor | None) -> Tensor:
        """``weight [out, in]``, or some rows of it, as a reader of that type gets it: float32. ``gram, factor``: of its
        inputs, and of the Gram matrix's damped inverse; None outside the layers. Of a stack of problems ``[E, …]``
        each. Where the method does not compensate, ``gram`` is the diagonal alone, ``[in]``, and there is no factor."""
        raise NotImplementedError

    @property
    def importance_file(self) -> str | None:
        """An importance matrix that the recipe names."""
        return None

    def require(self, device: torch.device) -> None:
        """Raises QtoolError (exit 3) where a package is missing that `quantize` takes: before the work, not after
        hours."""

    def workspace(self, out: int, columns: int) -> int:
        """Float32 numbers beside the weights while an input group of ``out`` rows in all is worked on."""
        return 0

    def remarks(self, ledger: Mapping[str, Mapping[str, float]]) -> list[str]:
        """What its records say that a user should hear."""
        return []


def members_of(methods: Sequence[Method], owners: Sequence[int], ranks: int) -> list[tuple[int, ...]]:
    """The ranks that round each output together: where its statistics are Gram matrices those, too, that make none
    such."""
    return crews_of([method.cost if method.needs.gram else 0 for method in methods], owners, ranks)
