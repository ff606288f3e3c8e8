"""What a quantization algorithm returns: integer codes and the numbers that turn them back into weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from qtool import QtoolError
from qtool.convert.formats.gguf.ggml import GgmlBlocks, same_bits

CPU = torch.device("cpu")
MAX_BLOCK = 4096  # bitsandbytes' largest


@dataclass(frozen=True)
class UniformCodes:
    """A linear on a uniform grid: ``w[o, i] = (codes[o, i] - zero[o, g(i)]) * scale[o, g(i)]``, g(i) = i // group_size
    unless ``g_idx`` says otherwise.

    codes uint8 ``[out, in]`` in 0 .. 2**bits - 1; scale (as stored: float16 or bfloat16) and zero uint8 ``[out,
    groups]``; group_size: columns to a group, ``in`` where a row is one group; g_idx int64 ``[in]`` (None: the
    columns in order).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group_size: int
    g_idx: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Weight ``[out, in]``: computed in float32, then rounded once to ``dtype``."""
        out, columns = self.codes.shape
        if self.g_idx is not None:
            weight = (self.codes.float() - self.zero[:, self.g_idx].float()).mul_(self.scale[:, self.g_idx].float())
            return weight.to(dtype)
        grouped = self.codes.view(out, -1, self.group_size).float()
        weight = (grouped - self.zero.float().unsqueeze(-1)).mul_(self.scale.float().unsqueeze(-1))
        return weight.view(out, columns).to(dtype)

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.codes.device

    def pieces(self, weights: int) -> Iterator[UniformCodes]:
        """Its rows, as many at a time as hold ``weights`` weights."""
        step = max(1, weights // self.codes.shape[1])
        for first in range(0, self.codes.shape[0], step):
            codes, scale, zero = (t[first : first + step] for t in (self.codes, self.scale, self.zero))
            yield replace(self, codes=codes, scale=scale, zero=zero)

    def equals(self, other: object) -> bool:
        """Bit for bit: codes, scales, zeros and geometry."""
        return (
            isinstance(other, UniformCodes)
            and (self.bits, self.group_size) == (other.bits, other.group_size)
            and same_bits(self.codes, other.codes)
            and self.scale.dtype == other.scale.dtype
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero, other.zero)
            and _same(self.g_idx, other.g_idx)
        )


@dataclass(frozen=True)
class Nested:
    """The second quantization of NF4's block maxima: ``absmax = table[codes] * scale[block] + offset``.

    scale float32 ``[ceil(blocks / block)]``, table float32 ``[256]``, block: block maxima to a scale.
    """

    scale: torch.Tensor
    table: torch.Tensor
    block: int
    offset: float


@dataclass(frozen=True)
class Nf4Blocks:
    """A linear in NF4: blocks of ``block`` consecutive weights (row-major), each a 4-bit index into ``table`` times the
    block's largest magnitude. Dettmers et al., "QLoRA", arXiv 2305.14314; bitsandbytes' functional.py (QuantState).

    packed uint8 ``[out * in / 2, 1]``, the first of two weights in the high nibble; absmax float32 ``[blocks]``, or
    uint8 with ``nested``; table float32 ``[16]``; dtype: of the source weight, which dequantizing rounds to.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    table: torch.Tensor
    shape: tuple[int, int]
    block: int
    dtype: torch.dtype
    nested: Nested | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Weight ``[out, in]`` as bitsandbytes' dequantize_4bit gives it (rounded to the source's dtype), in
        ``dtype``."""
        codes = torch.arange(256, device=self.packed.device)
        pairs = torch.stack((self.table[codes >> 4], self.table[codes & 15]), dim=-1)  # a byte's two weights
        both = pairs.float().view(torch.int64).flatten()  # looked up as one number: a third of the time
        values = both.index_select(0, self.packed.flatten().int()).view(torch.float32)
        count, maxima = self.shape[0] * self.shape[1], self.block_maxima()
        if count % self.block == 0:
            values = values.view(-1, self.block).mul_(maxima[:, None])
        else:
            values = values[:count].mul_(maxima.repeat_interleave(self.block)[:count])
        return values.to(self.dtype).view(self.shape).to(dtype)

    def block_maxima(self) -> torch.Tensor:
        """float32 ``[blocks]``."""
        if self.nested is None:
            return self.absmax.float()
        scales = self.nested.scale.repeat_interleave(self.nested.block)[: self.absmax.numel()]
        return self.nested.table[self.absmax.int()].mul_(scales).add_(self.nested.offset)

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.packed.device

    def pieces(self, weights: int) -> Iterator[Nf4Blocks]:
        """Its rows, about as many at a time as hold ``weights`` weights: so many that they end with a block."""
        rows, columns = self.shape
        unit = 2 * self.block // math.gcd(columns, 2 * self.block)
        step = unit * max(1, weights // columns // unit)
        flat, maxima = self.packed.flatten(), self.block_maxima()
        for first in range(0, rows, step):
            count = min(step, rows - first)
            begin, end = first * columns, (first + count) * columns
            packed, absmax = flat[begin // 2 : -(-end // 2)], maxima[begin // self.block : -(-end // self.block)]
            yield replace(self, packed=packed, absmax=absmax, shape=(count, columns), nested=None)

    def equals(self, other: object) -> bool:
        """Bit for bit."""
        if not isinstance(other, Nf4Blocks) or (self.nested is None) != (other.nested is None):
            return False
        if (self.shape, self.block, self.dtype) != (other.shape, other.block, other.dtype):
            return False
        pairs = [(self.packed, other.packed), (self.absmax, other.absmax), (self.table, other.table)]
        if self.nested is not None and other.nested is not None:
            pairs += [(self.nested.scale, other.nested.scale), (self.nested.table, other.nested.table)]
            if (self.nested.block, self.nested.offset) != (other.nested.block, other.nested.offset):
                return False
        return all(a.dtype == b.dtype and same_bits(a, b) for a, b in pairs)


Codes = UniformCodes | Nf4Blocks | GgmlBlocks


def check_codes(codes: Codes) -> None:
    """Raises ValueError where the parts, which a file may have from anywhere, are not those of one linear."""
    if isinstance(codes, UniformCodes):
        (out, columns), groups = codes.codes.shape, codes.scale.shape[-1]
        if codes.scale.shape != (out, groups) or codes.zero.shape != (out, groups):
            raise ValueError(f"codes of {out} rows, scales {[*codes.scale.shape]}, zeros {[*codes.zero.shape]}")
        if codes.g_idx is None and groups * codes.group_size != columns:
            raise ValueError(f"{groups} groups of {codes.group_size} are not {columns} columns")
        g_idx = codes.g_idx
        if g_idx is not None and (g_idx.shape != (columns,) or g_idx.min() < 0 or g_idx.max() >= groups):
            raise ValueError(f"g_idx does not name one of {groups} groups for each of {columns} columns")
    elif isinstance(codes, Nf4Blocks):
        weights, blocks = codes.shape[0] * codes.shape[1], codes.absmax.numel()
        sizes = (codes.packed.numel(), blocks, codes.table.numel())
        if not 0 < codes.block <= MAX_BLOCK or sizes != (-(-weights // 2), -(-weights // codes.block), 16):
            raise ValueError(f"{weights} weights in blocks of {codes.block} are not {sizes} bytes, maxima and values")
        n = codes.nested
        if n is not None and not (
            0 < n.block <= MAX_BLOCK and n.scale.numel() == -(-blocks // n.block) and n.table.numel() == 256
        ):
            raise ValueError(f"{blocks} maxima in blocks of {n.block} do not have {n.scale.numel()} scales")


def group_size_of(said: object, columns: int) -> int:
    """What a config says of its groups, -1 being whole rows. Raises QtoolError for what is no size."""
    if not isinstance(said, int) or isinstance(said, bool) or not (said > 0 or said == -1):
        raise QtoolError(f"quantization_config: group_size is {said!r}; a number above 0, or -1, is needed.")
    return columns if said == -1 else said


def names_in(said: object, key: str) -> list[str]:
    """A list of module names in a config, or nothing. Raises QtoolError for what is neither."""
    if said is None:
        return []
    if not isinstance(said, list) or not all(isinstance(name, str) for name in said):
        raise QtoolError(f"quantization_config: {key} is no list of names.")
    return said


def ordered_groups(columns: int, group_size: int, device: torch.device = CPU) -> torch.Tensor:
    """``i // group_size`` for every column: int64 ``[columns]``."""
    return torch.arange(columns, device=device) // group_size


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
