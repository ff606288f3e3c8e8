"""llama.cpp's block search on an accelerator: the plain PyTorch twin of the kernels in kquant_kernels.py.

Every sum runs in the order of ggml's C code (ggml/src/ggml-quants.c of llama.cpp) and nothing is fused, so that the
blocks are the same bytes as llama-quantize's on x86-64. Where the C code's arithmetic leaves float32 (weights below
1e-37, scales beyond float16) the blocks here stay finite.

Values lie as ``[elements of a block, blocks]``: a block is a column, sums run down it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.convert.formats.gguf.ggml import BLOCKS, GgmlBlocks, row_bytes
from qtool.convert.formats.gguf.ggml_fields import Fields, pack
from qtool.quantize.methods.kquant_candidates import FLAT, HALF_MAX, PLAIN, TINY, WEIGHED, AffineSearch

CHUNK_WEIGHTS = 1 << 22
TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q5_0", "Q5_1")


def quantize(weight: Tensor, type_name: str, importance: Tensor | None = None) -> GgmlBlocks:
    """``weight [out, in]`` of any float dtype -> blocks on its device; ``importance``: float32 ``[in]``, what a squared
    error in each column counts (None: the type's own rule). ``type_name``: one of `TYPES`; ``in`` divides by its block.
    """
    out, columns = weight.shape
    size = row_bytes(type_name, columns)
    row = None if importance is None else importance.to(weight.device, torch.float32).contiguous()
    if weight.is_cuda:
        from qtool.quantize.methods.kquant_kernels import quantize_rows

        return GgmlBlocks(quantize_rows(weight.contiguous(), type_name, row), type_name, (out, columns))
    parts = weight.split(max(1, CHUNK_WEIGHTS // columns))
    data = torch.cat([_quantize_rows(part.float(), type_name, row) for part in parts])
    return GgmlBlocks(data.view(out, size), type_name, (out, columns))


def _quantize_rows(weight: Tensor, type_name: str, row: Tensor | None) -> Tensor:
    """-> uint8 ``[out * blocks of a row, bytes of a block]``."""
    elements = BLOCKS[type_name][0]
    x = weight.reshape(-1, elements).t()
    qw = None if row is None else row.expand_as(weight).reshape(-1, elements).t()
    if type_name in ("Q4_K", "Q5_K"):
        return _affine_super_blocks(x, qw, type_name)
    if type_name == "Q6_K":
        return _symmetric_super_blocks(x, qw)
    if type_name == "Q8_0":
        return _eight_bits(x)
    if qw is not None:  # a block of 32 weighs its errors by the whole row's mean square
        squares = column_sum(weight.t() * weight.t())
        sigma = (squares / torch.full_like(squares, weight.shape[1])).repeat_interleave(weight.shape[1] // elements)
        qw = qw * root(sigma + x * x)
    return _five_bits(x, qw) if type_name == "Q5_0" else _five_bits_affine(x, qw)


def _affine_super_blocks(x: Tensor, qw: Tensor | None, type_name: str) -> Tensor:
    """Q4_K and Q5_K: eight sub-blocks of 32, each ``d * scale * code - dmin * minimum``."""
    search = (PLAIN if qw is None else WEIGHED)[type_name]
    sub = x.reshape(8, 32, -1)  # [sub-block, element, super-block]
    flat = sub.transpose(0, 1).reshape(32, -1)
    if qw is None:
        weights = root(column_sum(flat * flat) / 32) + flat.abs()
    else:
        sigma = 2 * column_sum(x * x) / 256
        weights = (qw * root(sigma + x * x)).reshape(8, 32, -1).transpose(0, 1).reshape(32, -1)
    scale, minimum, codes = fit_affine(flat, weights, search)
    scales, minima = scale.view(8, -1), minimum.view(8, -1)
    if qw is None:
        (d, ls), (dmin, lm) = _largest_scale(scales), _largest_scale(minima)
    else:
        sums = column_sum(weights).view(8, -1)
        (d, ls), (dmin, lm) = fit_positive(scales, sums, 63), fit_positive(minima, sums, 63)
    d, dmin = half(d), half(dmin)
    step, offset = (d.float() * ls)[:, None], (dmin.float() * lm)[:, None]
    rounded = ((sub + offset) / step).round().clamp(0, search.levels)
    codes = torch.where(step == 0, codes.view(32, 8, -1).transpose(0, 1), rounded)
    return _packed(type_name, d, codes, dmin, ls, lm)


def _symmetric_super_blocks(x: Tensor, qw: Tensor | None) -> Tensor:
    """Q6_K: sixteen sub-blocks of 16, each ``d * scale * code``, the scales signed bytes."""
    sub = x.reshape(16, 16, -1)
    flat = sub.transpose(0, 1).reshape(16, -1)
    weights = flat * flat if qw is None else qw.reshape(16, 16, -1).transpose(0, 1).reshape(16, -1)
    scale, codes = fit_symmetric(flat, weights, 32)
    scales = scale.view(16, -1)
    largest = signed_largest(scales)
    nothing = largest.abs() < TINY
    inverse = over(-128, torch.where(nothing, 1.0, largest))
    d = torch.where(nothing, 0.0, half(over(1, inverse)))
    bytes_ = torch.where(nothing, 0.0, (inverse * scales).round().clamp(-128, 127))
    step = (d.float() * bytes_)[:, None]
    rounded = (sub / step).round().clamp(-32, 31) + 32
    codes = torch.where(step == 0, codes.view(16, 16, -1).transpose(0, 1), rounded)
    return _packed("Q6_K", d, torch.where(nothing, 0.0, codes) - 32, steps=bytes_)


def _eight_bits(x: Tensor) -> Tensor:
    """Q8_0: 32 signed bytes; halves round away from zero. The importance row does not matter."""
    d = x.abs().amax(0)
    d = d / torch.full_like(d, 127)
    inverse = torch.where(d == 0, 0.0, over(1, d)).clamp(max=torch.finfo(torch.float32).max)
    scaled = x * inverse
    whole = scaled.abs().floor()
    codes = torch.where(scaled.abs() - whole >= 0.5, whole + 1, whole).clamp(max=127).copysign(scaled)
    return _packed("Q8_0", half(d), codes)


def _five_bits(x: Tensor, weights: Tensor | None) -> Tensor:
    """Q5_0: 32 codes -16…15 of one scale; the fifth bits lie in four bytes of their own."""
    if weights is None:
        d = signed_largest(x) / -16
        inverse = torch.where(d.abs() < 1 / torch.finfo(torch.float32).max, 0.0, over(1, d))
        codes = (x * inverse + 16.5).floor().clamp(0, 31)
    else:
        d, codes = fit_symmetric(x, weights, 16)
    return _packed("Q5_0", half(d), codes - 16)


def _five_bits_affine(x: Tensor, weights: Tensor | None) -> Tensor:
    """Q5_1: 32 codes 0…31, ``d * code + m``."""
    if weights is None:
        low = x.amin(0)
        d = (x.amax(0) - low) / torch.full_like(low, 31)
        inverse = torch.where(d < 1 / torch.finfo(torch.float32).max, 0.0, over(1, d))
        codes = ((x - low) * inverse + 0.5).floor().clamp(0, 31)
    else:
        d, minimum, codes = fit_affine(x, weights, WEIGHED["Q5_K"])
        low = 0.0 - minimum
    return _packed("Q5_1", half(d), codes, -half(low))


def fit_affine(x: Tensor, weights: Tensor, search: AffineSearch) -> tuple[Tensor, Tensor, Tensor]:
    """``x, weights [n, blocks]`` -> scale and minimum ``[blocks]`` and codes ``[n, blocks]`` with
    ``x ≈ scale * code - minimum``: each candidate's codes get their weighted least-squares line (minimum >= 0), the
    line of least weighted error wins, and the candidates after it start from its minimum.
    """
    low, high = x.amin(0).clamp(max=0), x.amax(0)
    flat = high - low < FLAT
    high = torch.where(flat, low + 1, high)
    sum_w, sum_x = column_sum(weights), column_sum(weights * x)
    inverse = over(search.levels, high - low)
    codes = (inverse * (x - low)).round().clamp(0, search.levels)
    scale, bottom = over(1, inverse), low
    best = column_sum(weights * (scale * codes + bottom - x).square())
    for numerator in search.numerators():
        tried = (over(numerator, high - bottom) * (x - bottom)).round().clamp(0, search.levels)
        weighed = weights * tried
        sum_l, sum_l2, sum_xl = column_sum(weighed), column_sum(weighed * tried), column_sum(weighed * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        slope = (sum_w * sum_xl - sum_x * sum_l) / determinant
        base = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        slope = torch.where(base > 0, sum_xl / sum_l2, slope)
        base = base.clamp(max=0)
        error = column_sum(weights * (slope * tried + base - x).square())
        better = (determinant > 0) & (error < best)
        codes = torch.where(better, tried, codes)
        best = torch.where(better, error, best)
        scale = torch.where(better, slope, scale)
        bottom = torch.where(better, base, bottom)
    scale, bottom = torch.where(flat, 0.0, scale), torch.where(flat, low, bottom)
    return scale, 0.0 - bottom, torch.where(flat, 0.0, codes)


def fit_symmetric(x: Tensor, weights: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """``x, weights [n, blocks]`` -> scale ``[blocks]``, codes + levels ``[n, blocks]`` with ``x ≈ scale * code``: 19
    scales about the one that maps the largest value to ``-levels``; the weighted least-squares scale of each."""
    largest = signed_largest(x)
    nothing = largest.abs() < TINY
    largest = torch.where(nothing, 1.0, largest)
    scale = codes = best = torch.zeros_like(largest)
    for i in (0, *range(-9, 0), *range(1, 10)):
        numerator = -float(levels + torch.tensor(0.1) * i)
        tried = (over(numerator, largest) * x).round().clamp(-levels, levels - 1)
        sum_lx, sum_l2 = column_sum(weights * x * tried), column_sum(weights * tried * tried)
        if i == 0:
            scale = torch.where(sum_l2 == 0, 0.0, sum_lx / sum_l2)
            codes, best = tried, scale * sum_lx
            continue
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = torch.where(better, sum_lx / sum_l2, scale)
        best = torch.where(better, scale * sum_lx, best)
        codes = torch.where(better, tried, codes)
    return torch.where(nothing, 0.0, scale), torch.where(nothing, 0.0, codes + levels)


def fit_positive(x: Tensor, weights: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """``x, weights [n, blocks]`` -> scale ``[blocks]``, codes 0…levels with ``x ≈ scale * code``: nine scales about
    ``max / levels``, then five rounds in which each code may move where that raises the explained error."""
    largest = x.amax(0)
    nothing = largest < TINY
    largest = torch.where(nothing, 1.0, largest)
    inverse = best = torch.zeros_like(largest)
    for i in (0, *range(-4, 0), *range(1, 5)):
        tried = over(float(torch.tensor(0.1) * i + levels), largest)
        codes = (tried * x).round().clamp(0, levels)
        difference = x - over(1, tried) * codes
        error = column_sum(weights * difference * difference)
        better = torch.ones_like(nothing) if i == 0 else error < best
        inverse, best = torch.where(better, tried, inverse), torch.where(better, error, best)
    codes = (inverse * x).round().clamp(0, levels)
    sum_lx, sum_l2 = column_sum(weights * x * codes), column_sum(weights * codes * codes)
    rows = list(codes)
    for _ in range(5):
        for i, (value, weight) in enumerate(zip(x, weights, strict=True)):
            lx, l2 = sum_lx - weight * value * rows[i], sum_l2 - weight * rows[i] * rows[i]
            moved = (value * l2 / lx).round().clamp(0, levels)
            new_lx, new_l2 = lx + weight * value * moved, l2 + weight * moved * moved
            better = (lx > 0) & (l2 > 0) & (moved != rows[i]) & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            rows[i] = torch.where(better, moved, rows[i])
            sum_lx, sum_l2 = torch.where(better, new_lx, sum_lx), torch.where(better, new_l2, sum_l2)
    scale = torch.where(nothing | (sum_l2 <= 0), 0.0, sum_lx / sum_l2)
    return scale, torch.where(nothing, 0.0, torch.stack(rows))


def _largest_scale(values: Tensor) -> tuple[Tensor, Tensor]:
    """``[8, super-blocks]`` -> what 63 of them make up the largest, and each as a count of it."""
    largest = values.amax(0).clamp(min=0)
    inverse = torch.where(largest > 63 / torch.finfo(torch.float32).max, over(63, largest), 0.0)
    return largest / torch.full_like(largest, 63), (inverse * values).round().clamp(0, 63)


def signed_largest(x: Tensor) -> Tensor:
    """The first value of largest magnitude in each column."""
    largest = x[0]
    for value in x[1:]:
        largest = torch.where(value.abs() > largest.abs(), value, largest)
    return largest


def column_sum(values: Tensor) -> Tensor:
    """Down the columns, one after another: C's order, which torch.sum does not keep."""
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total


def over(number: float, values: Tensor) -> Tensor:
    """Rounded once: torch multiplies a number by the reciprocal."""
    return torch.full_like(values, number) / values


def root(values: Tensor) -> Tensor:
    """Rounded once: torch.sqrt of float32 may be a bit off."""
    return values.double().sqrt().float()


def half(value: Tensor) -> Tensor:
    """Always finite: what overflowed becomes the largest float16, what cannot be told 0."""
    return value.nan_to_num(0.0).clamp(-HALF_MAX, HALF_MAX).to(torch.float16)


def _packed(
    type_name: str,
    d: Tensor,
    codes: Tensor,
    dmin: Tensor | None = None,
    steps: Tensor | None = None,
    minima: Tensor | None = None,
) -> Tensor:
    """Fields with blocks as columns -> bytes ``[blocks, bytes of a block]``."""
    one = torch.ones_like(d, dtype=torch.float32)[None]
    rows = [part.float().reshape(-1, d.shape[0]).t() for part in (
        one if steps is None else steps, one if minima is None else minima, codes
    )]  # fmt: skip
    return pack(Fields(d.float(), torch.zeros_like(d).float() if dmin is None else dmin.float(), *rows), type_name)
