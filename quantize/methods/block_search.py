"""What one Triton thread does alone with the values of its block: round, search a scale, search a scale and a minimum.

kquants.py says the same in plain PyTorch. Sums keep ggml's order; with fused multiply-adds off the bytes are ggml's.
"""

from __future__ import annotations

# Kernels carry no annotations: Triton would compile them (pyproject.toml tells mypy).
import torch
import triton
import triton.language as tl

from qtool.quantize.methods.kquant_candidates import FLAT, HALF_MAX, TINY

FLOAT_MAX = tl.constexpr(torch.finfo(torch.float32).max)
TINIEST = tl.constexpr(TINY)
_FLAT, _HALF_MAX = tl.constexpr(FLAT), tl.constexpr(HALF_MAX)


@triton.jit
def nearest(x, low: tl.constexpr, high: tl.constexpr):
    """Round half to even, within low…high: adding 1.5 * 2**23 leaves no fraction."""
    return (tl.minimum(tl.maximum(x, low), high) + 12582912.0) - 12582912.0


@triton.jit
def over(number, x):
    return tl.div_rn(tl.zeros_like(x) + number, x)


@triton.jit
def to_half(x):
    known = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(known, -_HALF_MAX), _HALF_MAX).to(tl.float16)


@triton.jit
def bits(half):
    return half.to(tl.int16, bitcast=True).to(tl.int32) & 65535


@triton.jit
def load(weight, place, inside, count: tl.constexpr, stride: tl.constexpr):
    """``count`` values of each thread, ``stride`` apart, as float32."""
    values = ()
    for i in tl.static_range(count):
        values += (tl.load(weight + place + i * stride, mask=inside, other=0.0).to(tl.float32),)
    return values


@triton.jit
def sum_squares(values, count: tl.constexpr):
    total = values[0] * values[0]
    for i in tl.static_range(1, count):
        total += values[i] * values[i]
    return total


@triton.jit
def signed_largest(x, count: tl.constexpr):
    largest = x[0]
    for i in tl.static_range(1, count):
        largest = tl.where(tl.abs(x[i]) > tl.abs(largest), x[i], largest)
    return largest


@triton.jit
def fit_affine(x, weights, levels: tl.constexpr, first: tl.constexpr, step: tl.constexpr, last: tl.constexpr,
               count: tl.constexpr):  # fmt: skip
    """kquants.fit_affine for ``count`` values a thread -> scale, minimum, sum of weights; codes are
    ``nearest(inverse * (x - start))``."""
    low, high = x[0], x[0]
    sum_w, sum_x = weights[0], weights[0] * x[0]
    for i in tl.static_range(1, count):
        low, high = tl.minimum(low, x[i]), tl.maximum(high, x[i])
        sum_w += weights[i]
        sum_x += weights[i] * x[i]
    low = tl.minimum(low, 0.0)
    flat = high - low < _FLAT
    high = tl.where(flat, low + 1.0, high)
    inverse = over(levels + 0.0, high - low)
    scale, bottom, start = over(1.0, inverse), low, low
    best = tl.zeros_like(low)
    for i in tl.static_range(count):
        difference = (scale * nearest(inverse * (x[i] - low), 0.0, levels) + low) - x[i]
        best += weights[i] * (difference * difference)
    number = tl.zeros_like(low)
    for _ in range(last + 1):
        tried = over((first + step * number) + levels, high - bottom)
        number += 1.0
        sum_l, sum_l2, sum_xl = tl.zeros_like(low), tl.zeros_like(low), tl.zeros_like(low)
        codes = ()
        for i in tl.static_range(count):
            code = nearest(tried * (x[i] - bottom), 0.0, levels)
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
        for i in tl.static_range(count):
            difference = (slope * codes[i] + base) - x[i]
            error += weights[i] * (difference * difference)
        better = (determinant > 0) & (error < best)
        inverse, start = tl.where(better, tried, inverse), tl.where(better, bottom, start)
        best = tl.where(better, error, best)
        scale, bottom = tl.where(better, slope, scale), tl.where(better, base, bottom)
    scale, bottom = tl.where(flat, 0.0, scale), tl.where(flat, low, bottom)
    return scale, 0.0 - bottom, sum_w, tl.where(flat, 0.0, inverse), start


@triton.jit
def fit_positive(x, weights, levels: tl.constexpr, count: tl.constexpr):
    """kquants.fit_positive for ``count`` values a thread -> scale and codes."""
    largest = x[0]
    for i in tl.static_range(1, count):
        largest = tl.maximum(largest, x[i])
    nothing = largest < TINIEST
    largest = tl.where(nothing, 1.0, largest)
    inverse, best = over(levels, largest), tl.zeros_like(largest)
    for i in tl.static_range(count):
        difference = x[i] - over(1.0, inverse) * nearest(inverse * x[i], 0.0, levels)
        best += weights[i] * difference * difference
    number = tl.zeros_like(largest) - 4.0
    for _ in range(9):
        tried = over(0.1 * number + levels, largest)
        unit = over(1.0, tried)
        error = tl.zeros_like(largest)
        for i in tl.static_range(count):
            difference = x[i] - unit * nearest(tried * x[i], 0.0, levels)
            error += weights[i] * difference * difference
        better = (error < best) & (number != 0)
        inverse, best = tl.where(better, tried, inverse), tl.where(better, error, best)
        number += 1.0
    sum_lx, sum_l2 = tl.zeros_like(largest), tl.zeros_like(largest)
    codes = ()
    for i in tl.static_range(count):
        code = nearest(inverse * x[i], 0.0, levels)
        codes += (code,)
        sum_lx += weights[i] * x[i] * code
        sum_l2 += weights[i] * code * code
    for _ in range(5):
        moved = ()
        for i in tl.static_range(count):
            lx, l2 = sum_lx - weights[i] * x[i] * codes[i], sum_l2 - weights[i] * codes[i] * codes[i]
            code = nearest(tl.div_rn(x[i] * l2, lx), 0.0, levels)
            new_lx, new_l2 = lx + weights[i] * x[i] * code, l2 + weights[i] * code * code
            better = (lx > 0) & (l2 > 0) & (code != codes[i])
            better = better & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            moved += (tl.where(better, code, codes[i]),)
            sum_lx, sum_l2 = tl.where(better, new_lx, sum_lx), tl.where(better, new_l2, sum_l2)
        codes = moved
    scale = tl.where(nothing | (sum_l2 <= 0), 0.0, tl.div_rn(sum_lx, sum_l2))
    kept = ()
    for i in tl.static_range(count):
        kept += (tl.where(nothing, 0.0, codes[i]),)
    return scale, kept


@triton.jit
def fit_symmetric(x, weights, levels: tl.constexpr, count: tl.constexpr):
    """kquants.fit_symmetric for ``count`` values a thread -> scale, and the inverse that makes the codes (0: none)."""
    largest = signed_largest(x, count)
    nothing = tl.abs(largest) < TINIEST
    largest = tl.where(nothing, 1.0, largest)
    inverse = over(-levels, largest)
    sum_lx, sum_l2 = tl.zeros_like(largest), tl.zeros_like(largest)
    for i in tl.static_range(count):
        code = nearest(inverse * x[i], -levels, levels - 1.0)
        sum_lx += weights[i] * x[i] * code
        sum_l2 += weights[i] * code * code
    scale = tl.where(sum_l2 == 0, 0.0, tl.div_rn(sum_lx, sum_l2))
    best = scale * sum_lx
    number = tl.zeros_like(largest) - 9.0
    for _ in range(19):
        tried = over(-(levels + 0.1 * number), largest)
        sum_lx, sum_l2 = tl.zeros_like(largest), tl.zeros_like(largest)
        for i in tl.static_range(count):
            code = nearest(tried * x[i], -levels, levels - 1.0)
            sum_lx += weights[i] * x[i] * code
            sum_l2 += weights[i] * code * code
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2) & (number != 0)
        scale = tl.where(better, tl.div_rn(sum_lx, sum_l2), scale)
        best = tl.where(better, scale * sum_lx, best)
        inverse = tl.where(better, tried, inverse)
        number += 1.0
    return tl.where(nothing, 0.0, scale), tl.where(nothing, 0.0, inverse)
