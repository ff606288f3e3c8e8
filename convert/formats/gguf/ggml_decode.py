"""ggml's blocks back to numbers in plain PyTorch, on whatever device they lie; equal to the `gguf` package bit for bit.

Block layouts: ggml/src/ggml-common.h and dequantize_row_* in ggml/src/ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _half(data: Tensor) -> Tensor:
    """``[blocks, 2]`` bytes -> float32 ``[blocks, 1]``."""
    return data.contiguous().view(torch.float16).float()


def _nibbles(data: Tensor) -> Tensor:
    """``[…, n]`` -> ``[…, 2, n]``: the low halves, then the high ones."""
    return torch.stack((data & 15, data >> 4), dim=-2)


def _spread(data: Tensor, width: int, count: int) -> Tensor:
    """``[blocks, n]`` bytes -> ``[blocks, count, n]``: field i is ``width`` bits from bit ``i * width``."""
    shifts = torch.arange(0, count * width, width, dtype=torch.uint8, device=data.device)
    return (data[:, None, :] >> shifts[:, None]) & ((1 << width) - 1)


def _q8_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * b[:, 2:].view(torch.int8)


def _q5_0(b: Tensor) -> Tensor:
    fifth = _spread(b[:, 2:6], 1, 8).transpose(1, 2).reshape(-1, 32)
    return _half(b[:, :2]) * ((_nibbles(b[:, 6:]).flatten(1) | fifth << 4).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    fifth = _spread(b[:, 4:8], 1, 8).transpose(1, 2).reshape(-1, 32)
    return _half(b[:, :2]) * (_nibbles(b[:, 8:]).flatten(1) | fifth << 4).float() + _half(b[:, 2:4])


def _scaled(b: Tensor, codes: Tensor) -> Tensor:
    """``codes [blocks, 8, 32]``; bytes 4-15: eight scales and eight minima of six bits."""
    low, mid, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat((low & 63, high & 15 | low >> 6 << 4), dim=1)
    minima = torch.cat((mid & 63, high >> 4 | mid >> 6 << 4), dim=1)
    step, offset = _half(b[:, :2]) * scales, _half(b[:, 2:4]) * minima
    return step[:, :, None] * codes - offset[:, :, None]


def _q4_k(b: Tensor) -> Tensor:
    return _scaled(b, _nibbles(b[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32))


def _q5_k(b: Tensor) -> Tensor:
    low = _nibbles(b[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    return _scaled(b, low | _spread(b[:, 16:48], 1, 8) << 4)


def _q6_k(b: Tensor) -> Tensor:
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    high = _spread(b[:, 128:192].reshape(-1, 32), 2, 4).view(-1, 2, 4, 32)
    codes = (low | high << 4).float().view(-1, 16, 16) - 32
    return (_half(b[:, 208:]) * b[:, 192:208].view(torch.int8))[:, :, None] * codes


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
