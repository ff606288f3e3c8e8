"""Types of a key/value cache, simulated: numbers are rounded as the cache would store them, and stay as wide as before.

What a kernel does beside that (scores in 8 bits, rotated heads, another order of sums) is not in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qtool.evaluate.engines.facts import BF16, FP8, Q4_0, Q8_0, CacheType


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


def _fp8(x: Tensor) -> Tensor:
    """E4M3 with a scale of 1, as vLLM stores it where no scales were calibrated; larger values saturate."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.float().clamp(-largest, largest).to(torch.float8_e4m3fn).to(x.dtype)


def _q8_0(x: Tensor) -> Tensor:
    """ggml's `quantize_row_q8_0_ref`: 32 numbers share a float16 scale, the largest of them / 127."""
    blocks = x.float().unflatten(-1, (-1, Q8_0.block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = _half_away(torch.where(scale > 0, blocks / scale, 0.0))
    return _joined(codes, scale, x)


def _q4_0(x: Tensor) -> Tensor:
    """ggml's `quantize_row_q4_0_ref`: the number farthest from 0 becomes -8 times the scale."""
    blocks = x.float().unflatten(-1, (-1, Q4_0.block))
    farthest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = farthest / -8
    codes = torch.where(scale != 0, blocks / scale, 0.0).add(8.5).trunc().clamp(0, 15) - 8
    return _joined(codes, scale, x)


def _joined(codes: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    numbers: Tensor = (codes * scale.half().float()).flatten(-2)
    return numbers.to(like.dtype)


def _half_away(x: Tensor) -> Tensor:
    return x.sign() * (x.abs() + 0.5).floor()


SIMULATED: dict[CacheType, Callable[[Tensor], Tensor]] = {BF16: _bf16, FP8: _fp8, Q8_0: _q8_0, Q4_0: _q4_0}


def rounding(name: str) -> Callable[[Tensor], Tensor]:
    """Of the type of that name; "" leaves all as it is."""
    return next((function for kind, function in SIMULATED.items() if kind.name == name), lambda x: x)
