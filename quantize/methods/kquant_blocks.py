"""ggml's blocks as rounding chooses them: scales and shifts from a set, codes, and the way to the bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.convert.formats.gguf.ggml import BLOCKS, GgmlBlocks
from qtool.convert.formats.gguf.ggml_fields import Fields, pack
from qtool.quantize.chosen import Levels

CHUNK_WEIGHTS = 1 << 22
VISIT = 256  # columns whose errors meet the others' in one product: a super-block, or eight blocks


@dataclass(frozen=True)
class Kind:
    """``size``: columns of a sub-block; ``low``: the least code, ``top`` more the greatest; ``steps``: the least and
    greatest multiple of d, None where a block has a float16 scale of its own; ``affine``: with a shift."""

    size: int
    low: int
    top: int
    steps: tuple[int, int] | None
    affine: bool

    @property
    def levels(self) -> Levels:
        """For `descent.improve`, of weights that the shift was added to."""
        return Levels(self.top, self.size, torch.float32, sym=not self.affine)


KINDS = {
    "Q4_K": Kind(32, 0, 15, (0, 63), True), "Q5_K": Kind(32, 0, 31, (0, 63), True),
    "Q6_K": Kind(16, -32, 63, (-128, 127), False), "Q5_1": Kind(32, 0, 31, None, True),
    "Q2_K": Kind(16, 0, 3, (0, 15), True), "Q3_K": Kind(16, -4, 7, (-32, 31), False),
    "Q5_0": Kind(32, -16, 31, None, False), "Q8_0": Kind(32, -128, 255, None, False),
}  # fmt: skip


@dataclass
class ChosenBlocks:
    """``codes [out, in]``; ``scale, shift [out, in / size]`` with ``weight = scale * code - shift``, as stored; of
    super-blocks ``d, dmin [out, in / 256]``, which scale and shift are multiples of. All float32. Of a stack of
    problems ``[E, …]`` each."""

    kind: Kind
    codes: Tensor
    scale: Tensor
    shift: Tensor
    d: Tensor
    dmin: Tensor

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        """All tensors, as they are given."""
        return self.codes, self.scale, self.shift, self.d, self.dmin

    def weights(self) -> Tensor:
        """What llama.cpp reads ``[out, in]``."""
        codes = self.codes.unflatten(-1, (-1, self.kind.size))
        return torch.flatten(codes * self.scale.unsqueeze(-1) - self.shift.unsqueeze(-1), -2)

    def blocks(self, type_name: str) -> GgmlBlocks:
        """As bytes, of a stack the rows of one problem below the other's; packed some rows at a time, because packing
        takes several integers a weight."""
        flat = ChosenBlocks(self.kind, *(part.flatten(0, -2) for part in self.numbers))
        out, columns = flat.codes.shape
        step = max(1, CHUNK_WEIGHTS // columns)
        parts = [flat._packed(type_name, slice(start, start + step)) for start in range(0, out, step)]
        return GgmlBlocks(torch.cat(parts), type_name, (out, columns))

    def _packed(self, type_name: str, rows: slice) -> Tensor:
        elements = BLOCKS[type_name][0]
        subs = elements // self.kind.size
        codes = self.codes[rows].reshape(-1, elements)
        scale, shift = (part[rows].reshape(-1, subs) for part in (self.scale, self.shift))
        if self.kind.steps is None:
            one = torch.ones_like(scale)
            fields = Fields(scale[:, 0], shift[:, 0], one, one if self.kind.affine else 0 * one, codes)
        else:
            d, dmin = self.d[rows].reshape(-1), self.dmin[rows].reshape(-1)
            fields = Fields(d, dmin, count_of(scale, d[:, None]), count_of(shift, dmin[:, None]), codes)
        return pack(fields, type_name).view(len(self.codes[rows]), -1)


def of_blocks(blocks: GgmlBlocks) -> ChosenBlocks:
    """What ggml's own search, or an earlier one here, chose."""
    kind, fields, out = KINDS[blocks.type], blocks.fields(), blocks.shape[0]
    d, dmin = fields.d.view(out, -1), fields.dmin.view(out, -1)
    scale, shift = fields.d[:, None] * fields.steps, fields.dmin[:, None] * fields.minima
    return ChosenBlocks(kind, fields.codes.view(out, -1), scale.view(out, -1), shift.view(out, -1), d, dmin)


def count_of(value: Tensor, unit: Tensor) -> Tensor:
    """How often ``unit`` makes up ``value``."""
    return torch.where(unit == 0, 0.0, value / torch.where(unit == 0, 1.0, unit)).round()
