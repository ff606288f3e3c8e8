"""ggml's blocks while they are chosen: a column of weights in a row, so that rows of a matrix lie side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.quantize.methods.kquant_blocks import VISIT, ChosenBlocks, Kind
from qtool.quantize.methods.kquant_candidates import HALF_MAX


@dataclass(frozen=True)
class BlockColumns:
    """A `ChosenBlocks` transposed: ``codes [in, out]``, ``scale, shift [in / size, out]``, ``d, dmin [in / 256, out]``;
    of a stack of problems ``[E, …]`` each. What is chosen is written into these tensors."""

    kind: Kind
    codes: Tensor
    scale: Tensor
    shift: Tensor
    d: Tensor
    dmin: Tensor

    @classmethod
    def of(cls, chosen: ChosenBlocks) -> BlockColumns:
        """Copies."""
        copies = (part.mT.clone(memory_format=torch.contiguous_format) for part in chosen.numbers)
        return cls(chosen.kind, *copies)

    @classmethod
    def empty(cls, kind: Kind, weight: Tensor) -> BlockColumns:
        """For ``weight [in, out]``: codes as they come, all else 0."""
        *problems, columns, out = weight.shape
        scale, shift = weight.new_zeros(2, *problems, columns // kind.size, out)
        d, dmin = weight.new_zeros(2, *problems, -(-columns // VISIT), out)
        return cls(kind, torch.empty_like(weight), scale, shift, d, dmin)

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        """All tensors, as they are given."""
        return self.codes, self.scale, self.shift, self.d, self.dmin

    def part(self, visit: slice) -> BlockColumns:
        """A super-block, or as many columns of blocks: views."""
        size, number = self.kind.size, visit.start // VISIT
        subs, one = slice(visit.start // size, visit.stop // size), slice(number, number + 1)
        return BlockColumns(
            self.kind, self.codes[..., visit, :], self.scale[..., subs, :], self.shift[..., subs, :],
            self.d[..., one, :], self.dmin[..., one, :],
        )  # fmt: skip

    def weights(self) -> Tensor:
        """What llama.cpp reads ``[in, out]``."""
        codes = self.codes.unflatten(-2, (-1, self.kind.size))
        return torch.flatten((codes * self.scale.unsqueeze(-2)).sub_(self.shift.unsqueeze(-2)), -3, -2)

    def rows(self) -> ChosenBlocks:
        """Copies."""
        return ChosenBlocks(self.kind, *(part.mT.contiguous() for part in self.numbers))


@dataclass(frozen=True)
class Stored:
    """The scales and shifts that a sub-block may have: where ``kind`` has steps multiples of ``d`` and ``dmin``
    ``[1, 1, out]``, whose inverses lie beside them, else float16. ``nudges [1, n, 1]``: how far from the best."""

    kind: Kind
    d: Tensor
    dmin: Tensor
    over_d: Tensor
    over_dmin: Tensor
    nudges: Tensor

    @classmethod
    def of(cls, part: BlockColumns) -> Stored:
        """What the sub-blocks of one visit may have."""
        d, dmin = part.d.unsqueeze(-2), part.dmin.unsqueeze(-2)
        over_d, over_dmin = (torch.where(unit == 0, 0.0, 1 / unit) for unit in (d, dmin))
        nudges = torch.arange(-1.0, 2.0, device=d.device).view(1, -1, 1)
        return cls(part.kind, d, dmin, over_d, over_dmin, nudges)

    def scale(self, wished: Tensor, nudged: bool = False) -> Tensor:
        """The nearest to ``wished [1, n, out]``; its neighbours, too, where ``nudged``."""
        if self.kind.steps is None:
            return wished.clamp(-HALF_MAX, HALF_MAX).half().float()
        count = (wished * self.over_d).round_()
        return (count + self.nudges if nudged else count).clamp_(*self.kind.steps) * self.d

    def shift(self, wished: Tensor) -> Tensor:
        """The nearest to ``wished [1, n, out]``."""
        if self.kind.steps is None:
            return wished.clamp(-HALF_MAX, HALF_MAX).half().float()
        return (wished * self.over_dmin).round_().clamp_(*self.kind.steps) * self.dmin
