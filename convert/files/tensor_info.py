"""What is known of a tensor before it is read: where it lies in a shard, and how it is decoded where it is stored in
fewer than 16 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from qtool import QtoolError

# what four bits stand for: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, E2M1)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MX_BLOCK, MX_BIAS, MX_NAN = 32, 127, 255  # values that share a power of two; its bias; the code that is no number


@dataclass(frozen=True)
class Within:
    """Where a matrix lies in a larger tensor of a shard, or what a tensor is called there.

    name, shape: of what is stored. index: along its first axis; None: the whole tensor under another name. first: row
    of ``stored[index]`` at which the matrix begins; where that is ``transposed``, ``[in, out]``, the column.
    """

    name: str
    shape: tuple[int, ...]
    index: int | None = None
    first: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Float8:
    """How a matrix of 8-bit floats is read: its codes, and its scales, one for each ``block`` of rows and columns, for
    each row, or for all."""

    codes: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, first: int, dtype: torch.dtype) -> torch.Tensor:
        """The rows of the matrix from ``first`` on. ``scales``: all. Raises QtoolError for what is no scale."""
        if not bool((scales.isfinite() & (scales >= 0)).all()):
            raise QtoolError(f"{self.scales.file}: {self.scales.stored_as('')} holds NaN, Inf or numbers below 0, "
                             "which are no scales. Download the model again.")  # fmt: skip
        values = codes.float()
        if scales.numel() == 1:
            return values.mul_(scales.float().view(())).to(dtype)
        (rows, columns), (height, width) = values.shape, self.block
        places = torch.arange(first, first + rows) // height, torch.arange(columns) // width
        grid = scales.float().view(scales.shape[0], -1)
        return values.mul_(grid[places[0]][:, places[1]]).to(dtype)


@dataclass(frozen=True)
class Mxfp4:
    """How a matrix of 4-bit floats is read, or all experts' in one tensor: codes ``[…, in / 2]``, two in a byte, the
    low half first; scales ``[…, in / 32]``, biased exponents of two. Nothing is rounded in bfloat16."""

    codes: TensorInfo
    scales: TensorInfo

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, first: int, dtype: torch.dtype) -> torch.Tensor:
        """As `Float8.decode`, or the experts from ``first`` on."""
        pairs = torch.stack((codes & 15, codes >> 4), -1).to(torch.int32)
        values = torch.tensor(E2M1)[pairs].view(*codes.shape[:-1], -1, MX_BLOCK)
        taken = scales[first : first + codes.shape[0]].to(torch.int32)
        if bool((taken == MX_NAN).any()):
            raise QtoolError(f"{self.scales.file}: {self.scales.stored_as('')} holds {MX_NAN}, which is no scale. "
                             "Download the model again.")  # fmt: skip
        powers = torch.ldexp(torch.ones(taken.shape), taken - MX_BIAS)
        return (values * powers.unsqueeze(-1)).flatten(-2).to(dtype)


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one tensor. ``within``: where it lies, if it is stored in another, or what it is
    called there; ``small``: how it is read, if it is stored in 4 or 8 bits."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    within: Within | None = None
    small: Float8 | Mxfp4 | None = None

    @property
    def nbytes(self) -> int:
        """As it is read."""
        return self.dtype.itemsize * prod(self.shape)

    def stored_as(self, name: str) -> str:
        """What a tensor that is here called ``name`` is called in its shard."""
        return self.within.name if self.within else name

    def named(self, name: str) -> TensorInfo:
        """The same, to be known under another name than ``name``."""
        return self if self.within else replace(self, within=Within(name, self.shape))

    def expert(self, name: str, index: int, first: int, shape: tuple[int, int], transposed: bool = False) -> TensorInfo:
        """A matrix of ``shape`` of one expert, from row ``first`` on, of a tensor of all experts that is here called
        ``name``. ``transposed``: it holds ``[in, out]``; never so where it is ``small``."""
        small = self.small
        if small is not None:
            codes, scales = (
                held.expert(name, index, first, (shape[0], held.shape[-1])) for held in (small.codes, small.scales)
            )
            return TensorInfo(self.file, self.dtype, shape, small=replace(small, codes=codes, scales=scales))
        return TensorInfo(
            self.file, self.dtype, shape, Within(self.stored_as(name), self.shape, index, first, transposed)
        )
