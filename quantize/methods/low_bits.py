"""Q2_K, Q3_K, IQ4_XS and IQ4_NL as ggml's own search makes them, for columns that are weighed by importance: each
sub-block's scale by search, a super-block's scales as multiples of one, codes at the scales that are stored.

The searches are kquants.py's (plain PyTorch) or those of low_bit_kernels.py (Triton, on an accelerator); all else is
the same code on both. As there, sums run in ggml's order (ggml/src/ggml-quants.c of llama.cpp), a block is a column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.convert.formats.gguf.ggml import BLOCKS, GgmlBlocks, row_bytes
from qtool.convert.formats.gguf.ggml_fields import LEVELS, UNEVEN, Fields, pack, uneven_code
from qtool.quantize.methods.kquant_candidates import LOW, TINY, TRIES, Searched
from qtool.quantize.methods.kquants import (
    CHUNK_WEIGHTS,
    column_sum,
    fit_affine,
    fit_positive,
    fit_symmetric,
    half,
    over,
    root,
    signed_largest,
)

TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL")


def quantize(weight: Tensor, type_name: str, importance: Tensor) -> GgmlBlocks:
    """``weight [out, in]`` of any float dtype -> blocks on its device; ``importance``: float32 ``[in]``, what a squared
    error in each column counts. ``type_name``: one of `TYPES`; ``in`` divides by its block."""
    out, columns = weight.shape
    size = row_bytes(type_name, columns)
    row = importance.to(weight.device, torch.float32).contiguous()
    parts = weight.contiguous().split(max(1, CHUNK_WEIGHTS // columns))
    data = torch.cat([_quantize_rows(part, type_name, row) for part in parts])
    return GgmlBlocks(data.view(out, size), type_name, (out, columns))


def _quantize_rows(weight: Tensor, type_name: str, row: Tensor) -> Tensor:
    """-> uint8 ``[out * blocks of a row, bytes of a block]``."""
    x = weight.float().reshape(-1, BLOCKS[type_name][0]).t()
    if type_name in UNEVEN:
        return _uneven(x, _uneven_scales(weight, x, type_name, row), type_name)
    if weight.is_cuda:
        from qtool.quantize.methods import low_bit_kernels

        found = low_bit_kernels.search(weight, type_name, row)
    else:
        found = (_affine if type_name == "Q2_K" else _symmetric)(x, _weights(x, row, weight, type_name))
    least, most = (0, 3) if type_name == "Q2_K" else (-4, 3)
    sub, d, dmin = x.reshape(16, 16, -1), half(found.d).float(), half(found.dmin).float()
    step, offset = d * found.steps, dmin * found.minima
    divisor = torch.where(step == 0, 1.0, step)
    rounded = ((sub + offset[:, None]) / divisor[:, None]).round().clamp(least, most)
    codes = torch.where((step == 0)[:, None], found.codes.transpose(0, 1), rounded)
    numbers = (part.reshape(-1, x.shape[1]).t().contiguous() for part in (found.steps, found.minima, codes))
    return pack(Fields(d, dmin, *numbers), type_name)


def _weights(x: Tensor, row: Tensor, weight: Tensor, type_name: str) -> Tensor:
    """What an error in each element counts ``[elements, blocks]``."""
    elements = len(x)
    sigma = column_sum(x * x) * (1 if type_name == "Q2_K" else 2) / elements
    return row.expand_as(weight).reshape(-1, elements).t() * root(sigma + x * x)


def _affine(x: Tensor, weights: Tensor) -> Searched:
    """Q2_K: sixteen sub-blocks of 16, each ``d * step * code - dmin * minimum``."""
    flat, weights = (part.reshape(16, 16, -1).transpose(0, 1).reshape(16, -1) for part in (x, weights))
    scale, minimum, codes = fit_affine(flat, weights, LOW)
    sums = column_sum(weights).view(16, -1)
    (d, steps), (dmin, minima) = (fit_positive(part.view(16, -1), sums, 15) for part in (scale, minimum))
    return Searched(d, dmin, steps, minima, codes.view(16, 16, -1))


def _symmetric(x: Tensor, weights: Tensor) -> Searched:
    """Q3_K: sixteen sub-blocks of 16, each ``d * step * code``, steps of six bits."""
    flat, weights = (part.reshape(16, 16, -1).transpose(0, 1).reshape(16, -1) for part in (x, weights))
    scale, codes = fit_symmetric(flat, weights, 4)
    d, steps = fit_symmetric(scale.view(16, -1), column_sum(weights).view(16, -1), 32)
    steps = steps - 32
    return Searched(d, torch.zeros_like(d), steps, torch.zeros_like(steps), codes.view(16, 16, -1) - 4)


def _uneven_scales(weight: Tensor, x: Tensor, type_name: str, row: Tensor) -> Tensor:
    """Of blocks of 32 ``[blocks of a super-block, super-blocks]``."""
    if weight.is_cuda:
        from qtool.quantize.methods import low_bit_kernels

        return low_bit_kernels.uneven_scales(weight, row, len(x))
    flat, weights = (
        part.reshape(-1, 32, x.shape[1]).transpose(0, 1).reshape(32, -1)
        for part in (x, _weights(x, row, weight, type_name))
    )
    return fit_uneven(flat, weights).view(-1, x.shape[1])


def fit_uneven(x: Tensor, weights: Tensor) -> Tensor:
    """``x, weights [n, blocks]`` -> scale ``[blocks]`` with ``x ≈ scale * level``: of scales about the one that maps
    the largest value to the first level the one whose codes' least squares explain most."""
    levels = torch.tensor(LEVELS, device=x.device)
    largest = signed_largest(x)
    nothing = largest.abs() < TINY
    largest = torch.where(nothing, 1.0, largest)
    first = over(1, -largest / torch.full_like(largest, float(levels[0])))
    scale = best = torch.zeros_like(largest)
    for tried in range(-TRIES - 1, TRIES + 1):
        inverse = first if tried < -TRIES else over(tried + float(levels[0]), largest)
        q = levels[uneven_code(inverse * x)]
        sum_qx, sum_q2 = column_sum(weights * q * x), column_sum(weights * q * q)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        if tried < -TRIES:
            better = sum_q2 > 0
        scale = torch.where(better, sum_qx / sum_q2, scale)
        best = torch.where(better, scale * sum_qx, best)
    return torch.where(nothing, 0.0, scale)


def _uneven(x: Tensor, scales: Tensor, type_name: str) -> Tensor:
    """IQ4_XS: eight blocks of 32 whose scales are multiples of d; IQ4_NL: a block has d alone. Codes are chosen at
    scales in float32, before d is rounded."""
    levels = torch.tensor(LEVELS, device=x.device)
    if type_name == "IQ4_NL":
        d, steps, step = scales[0], torch.ones_like(scales), scales
    else:
        largest = signed_largest(scales)
        d = -largest / torch.full_like(largest, 32)
        inverse = torch.where(d == 0, 0.0, over(1, d))
        steps = (inverse * scales).round().clamp(-32, 31)
        step = d * steps
    inverse = torch.where(step == 0, 0.0, over(1, step))
    codes = levels[uneven_code(inverse[:, None] * x.reshape(len(scales), 32, -1))]
    zero = torch.zeros_like(steps)
    numbers = (part.reshape(-1, x.shape[1]).t().contiguous() for part in (steps, zero, codes))
    return pack(Fields(half(d).float(), torch.zeros_like(d), *numbers), type_name)
