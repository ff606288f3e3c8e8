"""What descent chooses of: the levels of a grid, and what has been chosen so far, by rows and by columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.quantize.grid import Grid, GridSpec


@dataclass(frozen=True)
class Levels:
    """What codes may stand for: ``weight = scale * level``.

    ``table`` float32 ``[16]``, rising: the levels themselves, shared by all groups (NF4). None: the integers
    ``-zero .. top - zero``, where ``sym`` puts the zero in the middle and lets the scale have either sign if
    ``signed``, and otherwise each group has its own. ``dtype``: what a scale is stored as; float32 keeps it as it is.
    """

    top: int
    group_size: int
    dtype: torch.dtype
    sym: bool = False
    signed: bool = True
    table: tuple[float, ...] | None = None

    @property
    def rule(self) -> int:
        """How a scale is made of a range, as the kernel numbers it."""
        if self.table is not None:
            return 3
        return 2 if not self.sym else 0 if self.signed else 1

    @classmethod
    def of_grid(cls, spec: GridSpec, signed: bool = True) -> Levels:
        """Those of a uniform grid."""
        return cls(spec.levels, spec.group_size, spec.dtype, spec.sym, signed)


@dataclass(frozen=True)
class Chosen:
    """``levels`` float32 ``[out, in]``; ``scale`` and ``zero`` float32 ``[out, in / group_size]``."""

    levels: Tensor
    scale: Tensor
    zero: Tensor

    def weights(self) -> Tensor:
        """What a reader gets, float32 ``[out, in]``."""
        groups = self.levels.unflatten(-1, (self.scale.shape[-1], -1))
        return torch.flatten(groups * self.scale.unsqueeze(-1), -2)

    def codes(self) -> Tensor:
        """The integers of a uniform grid, 0 .. top."""
        groups = self.levels.unflatten(-1, (self.scale.shape[-1], -1))
        return torch.flatten(groups + self.zero.unsqueeze(-1), -2)

    @property
    def grid(self) -> Grid:
        return Grid(self.scale, self.zero)


@dataclass(frozen=True)
class Group:
    """``levels [g, out]``, ``scale`` and ``zero`` ``[1, out]``."""

    levels: Tensor
    scale: Tensor
    zero: Tensor

    def weights(self) -> Tensor:
        """What a reader gets, ``[g, out]``."""
        return self.levels * self.scale

    @classmethod
    def stack(cls, groups: Sequence[Group]) -> Group:
        """With a leading axis."""
        return cls(*(torch.stack([getattr(one, name) for one in groups]) for name in ("levels", "scale", "zero")))


@dataclass(frozen=True)
class Columns:
    """A Chosen with a column of weights in a row: ``levels [in, out]``, ``scale``, ``zero [in / group_size, out]``."""

    levels: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, chosen: Chosen) -> Columns:
        parts = (chosen.levels, chosen.scale, chosen.zero)
        return cls(*(tensor.mT.clone(memory_format=torch.contiguous_format) for tensor in parts))

    @classmethod
    def empty(cls, weight: Tensor, size: int) -> Columns:
        *problems, columns, out = weight.shape
        return cls(torch.empty_like(weight), *weight.new_empty(2, *problems, columns // size, out))

    def group(self, number: int, columns: slice) -> Group:
        one = slice(number, number + 1)
        return Group(self.levels[..., columns, :], self.scale[..., one, :], self.zero[..., one, :])

    def put(self, number: int, columns: slice, group: Group) -> None:
        self.levels[..., columns, :] = group.levels
        self.scale[..., number : number + 1, :] = group.scale
        self.zero[..., number : number + 1, :] = group.zero

    def rows(self) -> Chosen:
        return Chosen(*(tensor.mT.contiguous() for tensor in (self.levels, self.scale, self.zero)))
