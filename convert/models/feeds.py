"""What of a decoder layer is quantized: matrices, the inputs that feed them, and who made those inputs.

All names are below the layer's prefix (`Family.prefix` and its index). A checkpoint may hold a matrix as a tensor of
its own or as a part of a larger one; whoever reads a matrix asks it, and never its tensor's name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Matrix:
    """The unit that is quantized, ``[out, in]``.

    module: its name in artifacts, where it is ``{module}.weight`` or packed. tensor: the checkpoint's tensor that holds
    it. index: its place along the first axis of a tensor of experts. transposed: the tensor holds ``[in, out]``.
    first, step, count: its rows among the tensor's (of gate and up in one tensor a half each, or every second row); all
    rows where count is None. expert: the number of the routed expert that it is a part of, in a tensor of its own or
    not; it multiplies the tokens alone that the router sends there. None: it multiplies every token, as attention does
    and a shared expert. gate: the tensor ``[1, in]`` that a shared expert's output is multiplied by, times the input of
    the mixture, through a sigmoid; empty where there is none.
    """

    module: str
    tensor: str
    index: int | None = None
    transposed: bool = False
    first: int = 0
    step: int = 1
    count: int | None = None
    expert: int | None = None
    gate: str = ""

    def of(self, stored: Tensor) -> Tensor:
        """The matrix as a view of its tensor: what is written into it is written into the tensor."""
        held = stored if self.index is None else stored[self.index]
        held = held.mT if self.transposed else held
        return held if self.count is None else held[self.first : self.first + self.step * self.count : self.step]

    def shape(self, stored: Shape) -> tuple[int, int]:
        """``(out, in)`` in a tensor of shape ``stored``."""
        rows, columns = stored[-2:]
        if self.transposed:
            rows, columns = columns, rows
        return (rows if self.count is None else self.count), columns


def whole(module: str) -> Matrix:
    """A matrix that is a tensor of its own, as most are."""
    return Matrix(module, f"{module}.weight")


@dataclass(frozen=True)
class Norm:
    """A norm: its weight, and its bias where it has one, are divided by the scale. ``plus_one``: it applies 1 + weight.
    ``repeated``: one weight for all heads, used again every so many columns; these then share a scale."""

    name: str
    plus_one: bool = False
    repeated: int | None = None

    def ties(self, columns: int, device: torch.device) -> Tensor | None:
        """For each column of the consumers, the channel that made it: int64 ``[columns]``. None: each its own."""
        return None if self.repeated is None else torch.arange(columns, device=device) % self.repeated


@dataclass(frozen=True)
class Rows:
    """A matrix, row j of which made channel j: its rows, and their biases, are divided by the scale. first, count:
    which of its rows, where it makes more than this input; all where count is None."""

    matrix: Matrix
    first: int = 0
    count: int | None = None

    def part(self, rows: Tensor) -> Tensor:
        """Of one value for each row of the matrix a view of those that make the input."""
        return _part(rows, self.first, self.count)

    def ties(self, columns: int, device: torch.device) -> Tensor | None:
        """As `Norm.ties`."""
        return None


@dataclass(frozen=True)
class Heads:
    """A matrix of values: each of its heads of ``dim`` rows makes the channels of ``repeat`` heads of queries, which
    share its scales. first, count: as of `Rows`."""

    matrix: Matrix
    repeat: int
    dim: int
    first: int = 0
    count: int | None = None

    def part(self, rows: Tensor) -> Tensor:
        """As `Rows.part`."""
        return _part(rows, self.first, self.count)

    def ties(self, columns: int, device: torch.device) -> Tensor | None:
        """As `Norm.ties`."""
        column = torch.arange(columns, device=device)
        return column // (self.dim * self.repeat) * self.dim + column % self.dim


def _part(rows: Tensor, first: int, count: int | None) -> Tensor:
    return rows if count is None else rows[first : first + count]


@dataclass(frozen=True)
class Nothing:
    """Something that no scale passes: an activation that is not linear, a norm behind the matrix."""

    def ties(self, columns: int, device: torch.device) -> Tensor | None:
        """As `Norm.ties`."""
        return None


Producer = Norm | Rows | Heads | Nothing


@dataclass(frozen=True)
class Feed:
    """One input and everything that it feeds. ``producer`` made it: its output divided by s, and the columns of
    ``consumers`` and ``also`` multiplied by s, compute what they did.

    consumers: matrices to be quantized, which share the statistics of their input. also: tensors that take the scale
    and stay as they are otherwise: a router, the gate of a shared expert. split: engines that spread a layer over cards
    split the consumers' columns, for the input lies split already. adds: the consumer's output is added to the hidden
    states as it is, or a routed expert's by its router's weight. A producer has one feed in a layer, because it has one
    scale: `Decoder.feeds` refuses a second.
    """

    producer: Producer
    consumers: tuple[Matrix, ...]
    also: tuple[str, ...] = ()
    split: bool = False
    adds: bool = False

    @property
    def routed(self) -> bool:
        """Whether some consumers see the tokens alone that are sent to them: those whose `Matrix.expert` is a number.
        Beside them may stand others that see every token, as a shared expert does."""
        return any(matrix.expert is not None for matrix in self.consumers)

    @property
    def name(self) -> str:
        """The first consumer's module: where the input is seen, and the key of its statistics."""
        return self.consumers[0].module
