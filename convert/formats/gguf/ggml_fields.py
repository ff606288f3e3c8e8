"""ggml's blocks as the numbers that they hold, and these numbers as bytes again.

Block layouts: ggml/src/ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

UNEVEN = ("IQ4_XS", "IQ4_NL")
# Of these a code is the number of a level, and `Fields.codes` are the levels.
LEVELS = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)


@dataclass(frozen=True)
class Fields:
    """Blocks of sub-blocks: ``weight = d * step * code - dmin * minimum``, as numbers in float32.

    ``d, dmin [blocks]`` are float16 in the file, ``steps, minima [blocks, sub-blocks]`` and ``codes [blocks,
    elements]`` integers. Types without minima have zeros there; types with one scale have ones for steps (and minima).
    """

    d: Tensor
    dmin: Tensor
    steps: Tensor
    minima: Tensor
    codes: Tensor


def unpack(data: Tensor, type_name: str) -> Fields:
    """``data`` uint8 ``[blocks, bytes of a block]``."""
    return _UNPACK[type_name](data)


def pack(fields: Fields, type_name: str) -> Tensor:
    """-> uint8 ``[blocks, bytes of a block]``; what `unpack` reads."""
    return torch.cat(_PACK[type_name](fields), dim=1).to(torch.uint8)


def dequantize(fields: Fields) -> Tensor:
    """float32 ``[blocks, elements]``: in the order of llama.cpp's products."""
    step, offset = fields.d[:, None] * fields.steps, fields.dmin[:, None] * fields.minima
    codes = fields.codes.unflatten(1, (fields.steps.shape[1], -1))
    return torch.flatten(step[:, :, None] * codes - offset[:, :, None], 1)


def _half(data: Tensor) -> Tensor:
    """``[blocks, 2]`` bytes -> float32 ``[blocks]``."""
    return data.contiguous().view(torch.float16).float().squeeze(1)


def _bytes(value: Tensor) -> Tensor:
    """A number that float16 holds -> its two bytes ``[blocks, 2]``."""
    return value.to(torch.float16)[:, None].contiguous().view(torch.uint8)


def _nibbles(data: Tensor) -> Tensor:
    """``[…, n]`` -> ``[…, 2, n]``: the low halves, then the high ones."""
    return torch.stack((data & 15, data >> 4), dim=-2)


def _spread(data: Tensor, width: int, count: int) -> Tensor:
    """``[blocks, n]`` bytes -> ``[blocks, count, n]``: field i is ``width`` bits from bit ``i * width``."""
    shifts = torch.arange(0, count * width, width, dtype=torch.uint8, device=data.device)
    return (data[:, None, :] >> shifts[:, None]) & ((1 << width) - 1)


def _gather(fields: Tensor, width: int) -> Tensor:
    """The inverse of `_spread`: int ``[blocks, count, n]`` -> ``[blocks, n]``."""
    shifts = torch.arange(0, fields.shape[1] * width, width, device=fields.device)
    return (fields << shifts[:, None]).sum(1)


def _single(d: Tensor, codes: Tensor, low: Tensor | None = None) -> Fields:
    """A block with one scale, and with ``low`` a value of code 0."""
    one = torch.ones_like(d)[:, None]
    dmin, minima = (torch.zeros_like(d), torch.zeros_like(one)) if low is None else (-low, one)
    return Fields(d, dmin, one, minima, codes)


def _unpack_q8_0(b: Tensor) -> Fields:
    return _single(_half(b[:, :2]), b[:, 2:].contiguous().view(torch.int8).float())


def _pack_q8_0(f: Fields) -> tuple[Tensor, ...]:
    return _bytes(f.d), f.codes.to(torch.int32) & 255


def _fifth_bits(b: Tensor, at: int) -> Tensor:
    """Codes ``[blocks, 32]`` of five bits: the fifth from ``at``, the nibbles behind (element j beside j + 16)."""
    fifth = _spread(b[:, at : at + 4], 1, 8).transpose(1, 2).reshape(-1, 32)
    return (_nibbles(b[:, at + 4 :]).flatten(1) | fifth << 4).float()


def _five_bits(codes: Tensor) -> tuple[Tensor, Tensor]:
    q = codes.to(torch.int32)
    return _gather((q >> 4).view(-1, 4, 8).transpose(1, 2), 1), (q[:, :16] & 15) | (q[:, 16:] & 15) << 4


def _unpack_q5_0(b: Tensor) -> Fields:
    return _single(_half(b[:, :2]), _fifth_bits(b, 2) - 16)


def _pack_q5_0(f: Fields) -> tuple[Tensor, ...]:
    return _bytes(f.d), *_five_bits(f.codes + 16)


def _unpack_q5_1(b: Tensor) -> Fields:
    return _single(_half(b[:, :2]), _fifth_bits(b, 4), _half(b[:, 2:4]))


def _pack_q5_1(f: Fields) -> tuple[Tensor, ...]:
    return _bytes(f.d), _bytes(-f.dmin), *_five_bits(f.codes)


def _six_bits(b: Tensor, codes: Tensor) -> Fields:
    """Bytes 4-15: eight scales and eight minima of six bits."""
    low, mid, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    steps = torch.cat((low & 63, high & 15 | low >> 6 << 4), dim=1).float()
    minima = torch.cat((mid & 63, high >> 4 | mid >> 6 << 4), dim=1).float()
    return Fields(_half(b[:, :2]), _half(b[:, 2:4]), steps, minima, codes.flatten(1).float())


def _pack_affine(f: Fields, *between: Tensor) -> tuple[Tensor, ...]:
    """``between``: what lies before the nibbles (of 64 elements the first 32 low, the others high)."""
    ls, lm, q = f.steps.to(torch.int32), f.minima.to(torch.int32), f.codes.to(torch.int32).view(-1, 4, 2, 32)
    low, high = ls[:, :4] | ls[:, 4:] >> 4 << 6, lm[:, :4] | lm[:, 4:] >> 4 << 6
    both = ls[:, 4:] & 15 | (lm[:, 4:] & 15) << 4
    nibbles = (q[:, :, 0] & 15) | (q[:, :, 1] & 15) << 4
    return _bytes(f.d), _bytes(f.dmin), low, high, both, *between, nibbles.flatten(1)


def _unpack_q4_k(b: Tensor) -> Fields:
    return _six_bits(b, _nibbles(b[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32))


def _unpack_q5_k(b: Tensor) -> Fields:
    low = _nibbles(b[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    return _six_bits(b, low | _spread(b[:, 16:48], 1, 8) << 4)


def _pack_q5_k(f: Fields) -> tuple[Tensor, ...]:
    return _pack_affine(f, _gather(f.codes.to(torch.int32).view(-1, 8, 32) >> 4, 1))


def _unpack_q6_k(b: Tensor) -> Fields:
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    high = _spread(b[:, 128:192].reshape(-1, 32), 2, 4).view(-1, 2, 4, 32)
    steps = b[:, 192:208].contiguous().view(torch.int8).float()
    d = _half(b[:, 208:])
    codes = (low | high << 4).float().flatten(1) - 32
    return Fields(d, torch.zeros_like(d), steps, torch.zeros_like(steps), codes)


def _pack_q6_k(f: Fields) -> tuple[Tensor, ...]:
    q = (f.codes + 32).to(torch.int32).view(-1, 2, 4, 32)  # [block, half, quarter, element]
    low = torch.stack(((q[:, :, 0] & 15) | (q[:, :, 2] & 15) << 4, (q[:, :, 1] & 15) | (q[:, :, 3] & 15) << 4), dim=2)
    high = _gather((q >> 4).flatten(0, 1), 2).view(-1, 64)
    return low.flatten(1), high, f.steps.to(torch.int32) & 255, _bytes(f.d)


def _two_bits(data: Tensor) -> Tensor:
    """``[blocks, 64]`` -> codes of two bits ``[blocks, 256]``: of 128 elements four fields of 32 bytes."""
    return _spread(data.reshape(-1, 32), 2, 4).view(-1, 256)


def _of_two_bits(codes: Tensor) -> Tensor:
    """The inverse of `_two_bits`."""
    return _gather(codes.view(-1, 4, 32), 2).view(-1, 64)


def _unpack_q2_k(b: Tensor) -> Fields:
    steps, minima = (b[:, :16] & 15).float(), (b[:, :16] >> 4).float()
    return Fields(_half(b[:, 80:82]), _half(b[:, 82:84]), steps, minima, _two_bits(b[:, 16:80]).float())


def _pack_q2_k(f: Fields) -> tuple[Tensor, ...]:
    both = f.steps.to(torch.int32) | f.minima.to(torch.int32) << 4
    return both, _of_two_bits(f.codes.to(torch.int32)), _bytes(f.d), _bytes(f.dmin)


def _unpack_q3_k(b: Tensor) -> Fields:
    """Bytes 96-107: sixteen scales of six bits, four in a nibble each, then two of each in a byte's fields."""
    codes = _two_bits(b[:, 32:96]) | (_spread(b[:, :32], 1, 8) << 2).flatten(1)
    steps = (_nibbles(b[:, 96:104]) | (_spread(b[:, 104:108], 2, 4) << 4).view(-1, 2, 8)).flatten(1).float() - 32
    d = _half(b[:, 108:110])
    return Fields(d, torch.zeros_like(d), steps, torch.zeros_like(steps), codes.float() - 4)


def _pack_q3_k(f: Fields) -> tuple[Tensor, ...]:
    q, steps = (f.codes + 4).to(torch.int32), (f.steps + 32).to(torch.int32)
    low, high = steps & 15, steps >> 4
    scales = low[:, :8] | low[:, 8:] << 4, _gather(high.view(-1, 4, 4), 2)
    return _gather((q >> 2).view(-1, 8, 32), 1), _of_two_bits(q & 3), *scales, _bytes(f.d)


def uneven_code(value: Tensor) -> Tensor:
    """The number of the level next to each value; of two as near the greater."""
    middles = torch.tensor([(low + high) / 2 for low, high in pairwise(LEVELS)], device=value.device)
    return torch.bucketize(value.contiguous(), middles, right=True)


def _level(codes: Tensor) -> Tensor:
    return torch.tensor(LEVELS, device=codes.device)[codes.long()]


def _unpack_iq4_nl(b: Tensor) -> Fields:
    return _single(_half(b[:, :2]), _level(_nibbles(b[:, 2:]).flatten(1)))


def _uneven_nibbles(levels: Tensor) -> Tensor:
    q = uneven_code(levels.view(len(levels), -1, 2, 16)).to(torch.int32)
    return (q[:, :, 0] | q[:, :, 1] << 4).flatten(1)


def _pack_iq4_nl(f: Fields) -> tuple[Tensor, ...]:
    return _bytes(f.d), _uneven_nibbles(f.codes)


def _unpack_iq4_xs(b: Tensor) -> Fields:
    """Bytes 2-7: eight scales of six bits, first their upper two, then the lower four, two in a byte."""
    low = _nibbles(b[:, 4:8, None]).flatten(1)
    high = _spread(b[:, 2:4, None].flatten(1).reshape(-1, 1), 2, 4).view(-1, 8)
    steps = (low | high << 4).float() - 32
    d, codes = _half(b[:, :2]), _level(_nibbles(b[:, 8:].reshape(-1, 8, 16)).flatten(1))
    return Fields(d, torch.zeros_like(d), steps, torch.zeros_like(steps), codes)


def _pack_iq4_xs(f: Fields) -> tuple[Tensor, ...]:
    steps = (f.steps + 32).to(torch.int32)
    high = _gather((steps >> 4).view(-1, 4)[:, :, None], 2).view(-1, 2)
    low = steps.view(-1, 4, 2)
    return _bytes(f.d), high, (low[:, :, 0] & 15) | (low[:, :, 1] & 15) << 4, _uneven_nibbles(f.codes)


_UNPACK: dict[str, Callable[[Tensor], Fields]] = {
    "Q8_0": _unpack_q8_0, "Q5_0": _unpack_q5_0, "Q5_1": _unpack_q5_1,
    "Q4_K": _unpack_q4_k, "Q5_K": _unpack_q5_k, "Q6_K": _unpack_q6_k, "Q2_K": _unpack_q2_k, "Q3_K": _unpack_q3_k,
    "IQ4_XS": _unpack_iq4_xs, "IQ4_NL": _unpack_iq4_nl,
}  # fmt: skip
_PACK: dict[str, Callable[[Fields], tuple[Tensor, ...]]] = {
    "Q8_0": _pack_q8_0, "Q5_0": _pack_q5_0, "Q5_1": _pack_q5_1,
    "Q4_K": _pack_affine, "Q5_K": _pack_q5_k, "Q6_K": _pack_q6_k, "Q2_K": _pack_q2_k, "Q3_K": _pack_q3_k,
    "IQ4_XS": _pack_iq4_xs, "IQ4_NL": _pack_iq4_nl,
}  # fmt: skip
TYPES = tuple(_UNPACK)
