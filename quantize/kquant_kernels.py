"""Triton kernels that put weights into llama.cpp's blocks; what each does is what kquants.py does in plain PyTorch.

A thread searches one block (or one sub-block) alone, its values in registers, so that sums keep ggml's order without a
word between threads; with fused multiply-adds off the bytes are ggml's. Super-blocks take three launches:

_affine_search, _symmetric_search   a thread per sub-block: its scale (and minimum), and the codes' own scale
_affine_scales, _symmetric_scales   a thread per super-block: the scales' scale, stored; the steps that result
_affine_codes, _symmetric_codes     a thread per few words: codes at the stored steps, packed
_five_bits, _five_bits_affine, _eight_bits   blocks of 32 in one launch
"""

from __future__ import annotations

# Kernels carry no annotations: Triton would compile them, so mypy is told to let each pass.
import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.convert.ggml import BLOCKS, row_bytes
from qtool.quantize.kquants import FLAT, HALF_MAX, PLAIN, TINY, WEIGHED

THREADS = 128
LAUNCH = {"num_warps": THREADS // 32, "enable_fp_fusion": False}
_TINY, _FLAT, _HALF_MAX = tl.constexpr(TINY), tl.constexpr(FLAT), tl.constexpr(HALF_MAX)
_FLOAT_MAX = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _nearest(x, low: tl.constexpr, high: tl.constexpr):  # type: ignore[no-untyped-def]  # annotations would be compiled
    """Round half to even, within low…high: adding 1.5 * 2**23 leaves no fraction."""
    return (tl.minimum(tl.maximum(x, low), high) + 12582912.0) - 12582912.0


@triton.jit
def _over(number, x):  # type: ignore[no-untyped-def]
    return tl.div_rn(tl.zeros_like(x) + number, x)


@triton.jit
def _half(x):  # type: ignore[no-untyped-def]
    known = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(known, -_HALF_MAX), _HALF_MAX).to(tl.float16)


@triton.jit
def _bits(half):  # type: ignore[no-untyped-def]
    return half.to(tl.int16, bitcast=True).to(tl.int32) & 65535


@triton.jit
def _load(weight, place, inside, count: tl.constexpr, stride: tl.constexpr):  # type: ignore[no-untyped-def]
    """``count`` values of each thread, ``stride`` apart, as float32."""
    values = ()
    for i in tl.static_range(count):
        values += (tl.load(weight + place + i * stride, mask=inside, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _sum_squares(values, count: tl.constexpr):  # type: ignore[no-untyped-def]
    total = values[0] * values[0]
    for i in tl.static_range(1, count):
        total += values[i] * values[i]
    return total


@triton.jit
def _weigh(weight, importance, place, super, column, x, inside, weighed: tl.constexpr):  # type: ignore[no-untyped-def]
    """What each of a sub-block's 32 errors counts, as Q4_K and Q5_K have it."""
    weights = ()
    if weighed:
        sigma = tl.zeros_like(x[0])
        for i in range(256):
            value = tl.load(weight + super + i, mask=inside, other=0.0).to(tl.float32)
            sigma += value * value
        sigma = sigma * 0.0078125
        for i in tl.static_range(32):
            row = tl.load(importance + column + i, mask=inside, other=0.0)
            weights += (row * tl.sqrt_rn(sigma + x[i] * x[i]),)
    else:
        mean = tl.sqrt_rn(_sum_squares(x, 32) * 0.03125)
        for i in tl.static_range(32):
            weights += (mean + tl.abs(x[i]),)
    return weights


@triton.jit
def _fit_affine(x, weights, levels: tl.constexpr, first: tl.constexpr, step: tl.constexpr, last: tl.constexpr):  # type: ignore[no-untyped-def]
    """kquants.fit_affine for 32 values a thread -> scale, minimum, sum of weights; codes are
    ``nearest(inverse * (x - start))``."""
    low, high = x[0], x[0]
    sum_w, sum_x = weights[0], weights[0] * x[0]
    for i in tl.static_range(1, 32):
        low, high = tl.minimum(low, x[i]), tl.maximum(high, x[i])
        sum_w += weights[i]
        sum_x += weights[i] * x[i]
    low = tl.minimum(low, 0.0)
    flat = high - low < _FLAT
    high = tl.where(flat, low + 1.0, high)
    inverse = _over(levels + 0.0, high - low)
    scale, bottom, start = _over(1.0, inverse), low, low
    best = tl.zeros_like(low)
    for i in tl.static_range(32):
        difference = (scale * _nearest(inverse * (x[i] - low), 0.0, levels) + low) - x[i]
        best += weights[i] * (difference * difference)
    number = tl.zeros_like(low)
    for _ in range(last + 1):
        tried = _over((first + step * number) + levels, high - bottom)
        number += 1.0
        sum_l, sum_l2, sum_xl = tl.zeros_like(low), tl.zeros_like(low), tl.zeros_like(low)
        codes = ()
        for i in tl.static_range(32):
            code = _nearest(tried * (x[i] - bottom), 0.0, levels)
            codes += (code,)
            share = weights[i] * code
            sum_l += share
            sum_l2 += share * code
            sum_xl += share * x[i]
        determinant = sum_w * sum_l2 - sum_l * sum_l
        slope = tl.div_rn(sum_w * sum_xl - sum_x * sum_l, determinant)
        base = tl.div_rn(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        slope = tl.where(base > 0, tl.div_rn(sum_xl, sum_l2), slope)
        base = tl.minimum(base, 0.0)
        error = tl.zeros_like(low)
        for i in tl.static_range(32):
            difference = (slope * codes[i] + base) - x[i]
            error += weights[i] * (difference * difference)
        better = (determinant > 0) & (error < best)
        inverse, start = tl.where(better, tried, inverse), tl.where(better, bottom, start)
        best = tl.where(better, error, best)
        scale, bottom = tl.where(better, slope, scale), tl.where(better, base, bottom)
    scale, bottom = tl.where(flat, 0.0, scale), tl.where(flat, low, bottom)
    return scale, 0.0 - bottom, sum_w, tl.where(flat, 0.0, inverse), start


@triton.jit
def _affine_search(  # type: ignore[no-untyped-def]
    weight, importance, found, total, columns, levels: tl.constexpr, first: tl.constexpr, step: tl.constexpr,
    last: tl.constexpr, weighed: tl.constexpr, threads: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < total
    place = block * 32
    x = _load(weight, place, inside, 32, 1)
    weights = _weigh(weight, importance, place, block // 8 * 256, place % columns, x, inside, weighed)
    scale, minimum, sums, inverse, start = _fit_affine(x, weights, levels, first, step, last)
    tl.store(found + block, scale, mask=inside)
    tl.store(found + total + block, minimum, mask=inside)
    tl.store(found + 2 * total + block, sums, mask=inside)
    tl.store(found + 3 * total + block, inverse, mask=inside)
    tl.store(found + 4 * total + block, start, mask=inside)


@triton.jit
def _fit_positive(x, weights):  # type: ignore[no-untyped-def]
    """kquants.fit_positive for eight values a thread, levels 63 -> scale and codes."""
    largest = x[0]
    for i in tl.static_range(1, 8):
        largest = tl.maximum(largest, x[i])
    nothing = largest < _TINY
    largest = tl.where(nothing, 1.0, largest)
    inverse, best = _over(63.0, largest), tl.zeros_like(largest)
    for i in tl.static_range(8):
        difference = x[i] - _over(1.0, inverse) * _nearest(inverse * x[i], 0.0, 63.0)
        best += weights[i] * difference * difference
    number = tl.zeros_like(largest) - 4.0
    for _ in range(9):
        tried = _over(0.1 * number + 63.0, largest)
        unit = _over(1.0, tried)
        error = tl.zeros_like(largest)
        for i in tl.static_range(8):
            difference = x[i] - unit * _nearest(tried * x[i], 0.0, 63.0)
            error += weights[i] * difference * difference
        better = (error < best) & (number != 0)
        inverse, best = tl.where(better, tried, inverse), tl.where(better, error, best)
        number += 1.0
    sum_lx, sum_l2 = tl.zeros_like(largest), tl.zeros_like(largest)
    codes = ()
    for i in tl.static_range(8):
        code = _nearest(inverse * x[i], 0.0, 63.0)
        codes += (code,)
        sum_lx += weights[i] * x[i] * code
        sum_l2 += weights[i] * code * code
    for _ in range(5):
        moved = ()
        for i in tl.static_range(8):
            lx, l2 = sum_lx - weights[i] * x[i] * codes[i], sum_l2 - weights[i] * codes[i] * codes[i]
            code = _nearest(tl.div_rn(x[i] * l2, lx), 0.0, 63.0)
            new_lx, new_l2 = lx + weights[i] * x[i] * code, l2 + weights[i] * code * code
            better = (lx > 0) & (l2 > 0) & (code != codes[i])
            better = better & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            moved += (tl.where(better, code, codes[i]),)
            sum_lx, sum_l2 = tl.where(better, new_lx, sum_lx), tl.where(better, new_l2, sum_l2)
        codes = moved
    scale = tl.where(nothing | (sum_l2 <= 0), 0.0, tl.div_rn(sum_lx, sum_l2))
    kept = ()
    for i in tl.static_range(8):
        kept += (tl.where(nothing, 0.0, codes[i]),)
    return scale, kept


@triton.jit
def _largest_scale(x):  # type: ignore[no-untyped-def]
    """kquants._largest_scale for eight values a thread."""
    largest = tl.maximum(x[0], 0.0)
    for i in tl.static_range(1, 8):
        largest = tl.maximum(largest, x[i])
    inverse = tl.where(largest > 63.0 / _FLOAT_MAX, _over(63.0, largest), 0.0)
    codes = ()
    for i in tl.static_range(8):
        codes += (_nearest(inverse * x[i], 0.0, 63.0),)
    return tl.div_rn(largest, tl.zeros_like(largest) + 63.0), codes


@triton.jit
def _affine_scales(found, out, supers, words: tl.constexpr, weighed: tl.constexpr, threads: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sixteen bytes of header: d, dmin, eight scales and minima of six bits; found's first two rows become steps."""
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < supers
    total = supers * 8
    scales = _load(found, block * 8, inside, 8, 1)
    minima = _load(found + total, block * 8, inside, 8, 1)
    if weighed:
        sums = _load(found + 2 * total, block * 8, inside, 8, 1)
        d, ls = _fit_positive(scales, sums)
        dmin, lm = _fit_positive(minima, sums)
    else:
        d, ls = _largest_scale(scales)
        dmin, lm = _largest_scale(minima)
    d, dmin = _half(d), _half(dmin)
    head = out + block * words
    tl.store(head, _bits(d) | _bits(dmin) << 16, mask=inside)
    low, mid, high = tl.zeros_like(_bits(d)), tl.zeros_like(_bits(d)), tl.zeros_like(_bits(d))
    for i in tl.static_range(4):
        a, b = ls[i].to(tl.int32), ls[i + 4].to(tl.int32)
        low |= (a | b >> 4 << 6) << 8 * i
        p, q = lm[i].to(tl.int32), lm[i + 4].to(tl.int32)
        mid |= (p | q >> 4 << 6) << 8 * i
        high |= (b & 15 | (q & 15) << 4) << 8 * i
    tl.store(head + 1, low, mask=inside)
    tl.store(head + 2, mid, mask=inside)
    tl.store(head + 3, high, mask=inside)
    for i in tl.static_range(8):
        tl.store(found + block * 8 + i, d.to(tl.float32) * ls[i], mask=inside)
        tl.store(found + total + block * 8 + i, dmin.to(tl.float32) * lm[i], mask=inside)


@triton.jit
def _affine_codes(weight, found, out, supers, words: tl.constexpr, five: tl.constexpr, threads: tl.constexpr):  # type: ignore[no-untyped-def]
    """A thread takes four neighbouring columns of each of a super-block's eight sub-blocks."""
    thread = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    block, part = thread // 8, (thread % 8).to(tl.int32)
    inside = block < supers
    total = supers * 8
    levels: tl.constexpr = 31.0 if five else 15.0
    high = tl.zeros_like(part)
    even = tl.zeros_like(part)
    for s in tl.static_range(8):
        step = tl.load(found + block * 8 + s, mask=inside, other=0.0)
        offset = tl.load(found + total + block * 8 + s, mask=inside, other=0.0)
        inverse = tl.load(found + 3 * total + block * 8 + s, mask=inside, other=0.0)
        start = tl.load(found + 4 * total + block * 8 + s, mask=inside, other=0.0)
        word = tl.zeros_like(part)
        x = _load(weight, block * 256 + s * 32 + part * 4, inside, 4, 1)
        for i in tl.static_range(4):
            searched = _nearest(inverse * (x[i] - start), 0.0, levels)
            divisor = tl.where(step == 0, 1.0, step)
            code = tl.where(step == 0, searched, _nearest(tl.div_rn(x[i] + offset, divisor), 0.0, levels)).to(tl.int32)
            word |= (code & 15) << 8 * i
            high |= code >> 4 << 8 * i + s
        if s % 2 == 0:
            even = word
        else:
            place = out + block * words + (12 if five else 4) + s // 2 * 8 + part
            tl.store(place, even | word << 4, mask=inside)
    if five:
        tl.store(out + block * words + 4 + part, high, mask=inside)


@triton.jit
def _signed_largest(x, count: tl.constexpr):  # type: ignore[no-untyped-def]
    largest = x[0]
    for i in tl.static_range(1, count):
        largest = tl.where(tl.abs(x[i]) > tl.abs(largest), x[i], largest)
    return largest


@triton.jit
def _fit_symmetric(x, weights, levels: tl.constexpr, count: tl.constexpr):  # type: ignore[no-untyped-def]
    """kquants.fit_symmetric for ``count`` values a thread -> scale, and the inverse that makes the codes (0: none)."""
    largest = _signed_largest(x, count)
    nothing = tl.abs(largest) < _TINY
    largest = tl.where(nothing, 1.0, largest)
    inverse = _over(-levels, largest)
    sum_lx, sum_l2 = tl.zeros_like(largest), tl.zeros_like(largest)
    for i in tl.static_range(count):
        code = _nearest(inverse * x[i], -levels, levels - 1.0)
        sum_lx += weights[i] * x[i] * code
        sum_l2 += weights[i] * code * code
    scale = tl.where(sum_l2 == 0, 0.0, tl.div_rn(sum_lx, sum_l2))
    best = scale * sum_lx
    number = tl.zeros_like(largest) - 9.0
    for _ in range(19):
        tried = _over(-(levels + 0.1 * number), largest)
        sum_lx, sum_l2 = tl.zeros_like(largest), tl.zeros_like(largest)
        for i in tl.static_range(count):
            code = _nearest(tried * x[i], -levels, levels - 1.0)
            sum_lx += weights[i] * x[i] * code
            sum_l2 += weights[i] * code * code
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2) & (number != 0)
        scale = tl.where(better, tl.div_rn(sum_lx, sum_l2), scale)
        best = tl.where(better, scale * sum_lx, best)
        inverse = tl.where(better, tried, inverse)
        number += 1.0
    return tl.where(nothing, 0.0, scale), tl.where(nothing, 0.0, inverse)


@triton.jit
def _symmetric_search(weight, importance, found, total, columns, weighed: tl.constexpr, threads: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < total
    place = block * 16
    x = _load(weight, place, inside, 16, 1)
    weights = ()
    for i in tl.static_range(16):
        if weighed:
            weights += (tl.load(importance + place % columns + i, mask=inside, other=0.0),)
        else:
            weights += (x[i] * x[i],)
    scale, inverse = _fit_symmetric(x, weights, 32.0, 16)
    tl.store(found + block, scale, mask=inside)
    tl.store(found + total + block, inverse, mask=inside)


@triton.jit
def _symmetric_scales(found, out, supers, threads: tl.constexpr):  # type: ignore[no-untyped-def]
    """d and sixteen signed bytes; found's first row becomes steps, its second is 0 where the super-block is."""
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < supers
    scales = _load(found, block * 16, inside, 16, 1)
    largest = _signed_largest(scales, 16)
    nothing = tl.abs(largest) < _TINY
    inverse = _over(-128.0, tl.where(nothing, 1.0, largest))
    d = tl.where(nothing, 0.0, _half(_over(1.0, inverse)).to(tl.float32)).to(tl.float16)
    head = out + block * 105 + 96
    for i in tl.static_range(8):
        a = tl.where(nothing, 0.0, _nearest(inverse * scales[2 * i], -128.0, 127.0))
        b = tl.where(nothing, 0.0, _nearest(inverse * scales[2 * i + 1], -128.0, 127.0))
        pair = a.to(tl.int32) & 255 | (b.to(tl.int32) & 255) << 8
        tl.store(head + i, pair.to(tl.int16), mask=inside)
        tl.store(found + block * 16 + 2 * i, d.to(tl.float32) * a, mask=inside)
        tl.store(found + block * 16 + 2 * i + 1, d.to(tl.float32) * b, mask=inside)
        tl.store(found + supers * 16 + block * 16 + 2 * i, 0.0, mask=inside & nothing)
        tl.store(found + supers * 16 + block * 16 + 2 * i + 1, 0.0, mask=inside & nothing)
    tl.store(head + 8, d.to(tl.int16, bitcast=True), mask=inside)


@triton.jit
def _symmetric_codes(weight, found, out, supers, threads: tl.constexpr):  # type: ignore[no-untyped-def]
    """A thread takes two neighbouring columns in each quarter of half a super-block."""
    thread = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    block, half, part = thread // 32, (thread % 32 // 16).to(tl.int32), (thread % 16).to(tl.int32)
    inside = block < supers
    high = tl.zeros_like(part)
    quarters = ()
    for s in tl.static_range(4):
        group = block * 16 + half * 8 + s * 2 + part // 8
        step = tl.load(found + group, mask=inside, other=0.0)
        inverse = tl.load(found + supers * 16 + group, mask=inside, other=0.0)
        x = _load(weight, block * 256 + half * 128 + s * 32 + part * 2, inside, 2, 1)
        word = tl.zeros_like(part)
        for i in tl.static_range(2):
            searched = tl.where(inverse == 0, -32.0, _nearest(inverse * x[i], -32.0, 31.0))
            divisor = tl.where(step == 0, 1.0, step)
            code = tl.where(step == 0, searched, _nearest(tl.div_rn(x[i], divisor), -32.0, 31.0)).to(tl.int32) + 32
            word |= (code & 15) << 8 * i
            high |= code >> 4 << 8 * i + 2 * s
        quarters += (word,)
    place = out + block * 105 + half * 32 + part
    tl.store(place, (quarters[0] | quarters[2] << 4).to(tl.int16), mask=inside)
    tl.store(place + 16, (quarters[1] | quarters[3] << 4).to(tl.int16), mask=inside)
    tl.store(out + block * 105 + 64 + half * 16 + part, high.to(tl.int16), mask=inside)


@triton.jit
def _mean_squares(weight, found, rows, columns, threads: tl.constexpr):  # type: ignore[no-untyped-def]
    """A thread a row, one column after another."""
    row = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = row < rows
    total = tl.zeros((threads,), tl.float32)
    for column in range(columns):
        value = tl.load(weight + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        total += value * value
    tl.store(found + row, tl.div_rn(total, tl.zeros_like(total) + columns), mask=inside)


@triton.jit
def _weigh_by_row(importance, sigma, place, columns, x, inside):  # type: ignore[no-untyped-def]
    mean = tl.load(sigma + place // columns, mask=inside, other=0.0)
    weights = ()
    for i in tl.static_range(32):
        row = tl.load(importance + place % columns + i, mask=inside, other=0.0)
        weights += (row * tl.sqrt_rn(mean + x[i] * x[i]),)
    return weights


@triton.jit
def _store_five_bits(out, codes, inside):  # type: ignore[no-untyped-def]
    """Codes 0…31 of 32 values: four bytes of fifth bits, sixteen of nibbles, as ten 16-bit words."""
    for half in tl.static_range(2):
        high = tl.zeros_like(codes[0])
        for i in tl.static_range(16):
            high |= codes[half * 16 + i] >> 4 << i
        tl.store(out + half, high.to(tl.int16), mask=inside)
    for i in tl.static_range(8):
        a = codes[2 * i] & 15 | (codes[2 * i + 16] & 15) << 4
        b = codes[2 * i + 1] & 15 | (codes[2 * i + 17] & 15) << 4
        tl.store(out + 2 + i, (a | b << 8).to(tl.int16), mask=inside)


@triton.jit
def _five_bits(weight, importance, sigma, out, total, columns, weighed: tl.constexpr, threads: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < total
    place = block * 32
    x = _load(weight, place, inside, 32, 1)
    codes = ()
    if weighed:
        d, inverse = _fit_symmetric(x, _weigh_by_row(importance, sigma, place, columns, x, inside), 16.0, 32)
        for i in tl.static_range(32):
            code = tl.where(inverse == 0, 0.0, _nearest(inverse * x[i], -16.0, 15.0) + 16.0)
            codes += (code.to(tl.int32),)
    else:
        d = _signed_largest(x, 32) * -0.0625
        inverse = tl.where(tl.abs(d) < 1.0 / _FLOAT_MAX, 0.0, _over(1.0, d))
        for i in tl.static_range(32):
            codes += (tl.minimum(tl.maximum(x[i] * inverse + 16.5, 0.0), 31.0).to(tl.int32),)
    tl.store(out + block * 11, _half(d).to(tl.int16, bitcast=True), mask=inside)
    _store_five_bits(out + block * 11 + 1, codes, inside)


@triton.jit
def _five_bits_affine(weight, importance, sigma, out, total, columns, weighed: tl.constexpr, threads: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < total
    place = block * 32
    x = _load(weight, place, inside, 32, 1)
    codes = ()
    if weighed:
        weights = _weigh_by_row(importance, sigma, place, columns, x, inside)
        d, minimum, _, inverse, start = _fit_affine(x, weights, 31, -0.9, 0.05, 36)
        low = 0.0 - minimum
        for i in tl.static_range(32):
            codes += (_nearest(inverse * (x[i] - start), 0.0, 31.0).to(tl.int32),)
    else:
        low, high = x[0], x[0]
        for i in tl.static_range(1, 32):
            low, high = tl.minimum(low, x[i]), tl.maximum(high, x[i])
        d = tl.div_rn(high - low, tl.zeros_like(low) + 31.0)
        inverse = tl.where(d < 1.0 / _FLOAT_MAX, 0.0, _over(1.0, d))
        for i in tl.static_range(32):
            codes += (tl.minimum(tl.maximum((x[i] - low) * inverse + 0.5, 0.0), 31.0).to(tl.int32),)
    tl.store(out + block * 12, _half(d).to(tl.int16, bitcast=True), mask=inside)
    tl.store(out + block * 12 + 1, _half(low).to(tl.int16, bitcast=True), mask=inside)
    _store_five_bits(out + block * 12 + 2, codes, inside)


@triton.jit
def _eight_bits(weight, out, total, threads: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < total
    x = _load(weight, block * 32, inside, 32, 1)
    d = tl.abs(_signed_largest(x, 32))
    d = tl.div_rn(d, tl.zeros_like(d) + 127.0)
    inverse = tl.minimum(tl.where(d == 0, 0.0, _over(1.0, tl.where(d == 0, 1.0, d))), _FLOAT_MAX)
    tl.store(out + block * 17, _half(d).to(tl.int16, bitcast=True), mask=inside)
    for i in tl.static_range(16):
        pair = tl.zeros_like(inside.to(tl.int32))
        for j in tl.static_range(2):
            scaled = x[2 * i + j] * inverse
            size = tl.minimum(tl.abs(scaled), 127.0)
            whole = tl.floor(size)
            code = tl.where(size - whole >= 0.5, whole + 1.0, whole)
            pair |= (tl.where(scaled < 0, -code, code).to(tl.int32) & 255) << 8 * j
        tl.store(out + block * 17 + 1 + i, pair.to(tl.int16), mask=inside)


def quantize_rows(weight: Tensor, type_name: str, row: Tensor | None) -> Tensor:
    """``weight [out, in]`` contiguous, ``row [in]`` float32 -> uint8 ``[out, row bytes]``."""
    out, columns = weight.shape
    data = torch.empty(out, row_bytes(type_name, columns), dtype=torch.uint8, device=weight.device)
    weighed = row is not None
    importance = weight if row is None else row
    blocks = weight.numel() // BLOCKS[type_name][0]
    if type_name in ("Q4_K", "Q5_K"):
        search, words = (WEIGHED if weighed else PLAIN)[type_name], BLOCKS[type_name][1] // 4
        found, target = weight.new_empty(5, blocks * 8, dtype=torch.float32), data.view(torch.int32)
        _affine_search[_grid(blocks * 8)](
            weight, importance, found, blocks * 8, columns, search.levels, search.first, search.step, search.last,
            weighed, THREADS, **LAUNCH,
        )  # fmt: skip
        _affine_scales[_grid(blocks)](found, target, blocks, words, weighed, THREADS, **LAUNCH)
        _affine_codes[_grid(blocks * 8)](weight, found, target, blocks, words, type_name == "Q5_K", THREADS, **LAUNCH)
        return data
    target = data.view(torch.int16)
    if type_name == "Q6_K":
        found = weight.new_empty(2, blocks * 16, dtype=torch.float32)
        _symmetric_search[_grid(blocks * 16)](
            weight, importance, found, blocks * 16, columns, weighed, THREADS, **LAUNCH
        )
        _symmetric_scales[_grid(blocks)](found, target, blocks, THREADS, **LAUNCH)
        _symmetric_codes[_grid(blocks * 32)](weight, found, target, blocks, THREADS, **LAUNCH)
    elif type_name == "Q8_0":
        _eight_bits[_grid(blocks)](weight, target, blocks, THREADS, **LAUNCH)
    else:
        sigma = weight.new_empty(out, dtype=torch.float32)
        if weighed:
            _mean_squares[_grid(out)](weight, sigma, out, columns, THREADS, **LAUNCH)
        kernel = _five_bits if type_name == "Q5_0" else _five_bits_affine
        kernel[_grid(blocks)](weight, importance, sigma, target, blocks, columns, weighed, THREADS, **LAUNCH)
    return data


def _grid(threads: int) -> tuple[int]:
    return (triton.cdiv(threads, THREADS),)
