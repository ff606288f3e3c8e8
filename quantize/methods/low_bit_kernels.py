"""The searches of low_bits.py in Triton: a thread a sub-block, then a thread a super-block. Sums keep ggml's order;
with fused multiply-adds off the bytes are ggml's."""

from __future__ import annotations

# Kernels carry no annotations: Triton would compile them (pyproject.toml tells mypy).
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.convert.formats.gguf.ggml_fields import LEVELS
from qtool.quantize.methods.block_kernels import LAUNCH, THREADS, launch_grid
from qtool.quantize.methods.block_search import (
    TINIEST,
    fit_affine,
    fit_positive,
    fit_symmetric,
    load,
    nearest,
    over,
)
from qtool.quantize.methods.kquant_candidates import LOW, TRIES, Searched

_LOWEST, _TRIES = tl.constexpr(LEVELS[0]), tl.constexpr(TRIES)
_MIDDLES = tl.constexpr(tuple((low + high) / 2 for low, high in pairwise(LEVELS)))
_GAPS = tl.constexpr(tuple(high - low for low, high in pairwise(LEVELS)))


@triton.jit
def _weigh(weight, importance, super, column, x, inside, factor: tl.constexpr):
    """What each error of a sub-block of 16 counts: ``factor`` times the squares of its super-block is part of it."""
    sigma = tl.zeros_like(x[0])
    for i in range(256):
        value = tl.load(weight + super + i, mask=inside, other=0.0).to(tl.float32)
        sigma += value * value
    sigma = sigma * factor
    weights = ()
    for i in tl.static_range(16):
        row = tl.load(importance + column + i, mask=inside, other=0.0)
        weights += (row * tl.sqrt_rn(sigma + x[i] * x[i]),)
    return weights


@triton.jit
def _sum(values):
    total = values[0]
    for i in tl.static_range(1, 16):
        total += values[i]
    return total


@triton.jit
def _sub_blocks(weight, importance, found, codes, total, columns, affine: tl.constexpr, first: tl.constexpr,
                step: tl.constexpr, last: tl.constexpr, threads: tl.constexpr):  # fmt: skip
    """Sub-blocks of 16: ``found [3, total]`` gets scale, minimum and the sum of weights, ``codes [total, 16]``."""
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < total
    place = block * 16
    x = load(weight, place, inside, 16, 1)
    factor: tl.constexpr = 0.00390625 if affine else 0.0078125
    weights = _weigh(weight, importance, block // 16 * 256, place % columns, x, inside, factor)
    if affine:
        scale, minimum, _, inverse, start = fit_affine(x, weights, 3.0, first, step, last, 16)
        tl.store(found + total + block, minimum, mask=inside)
        for i in tl.static_range(16):
            tl.store(codes + place + i, nearest(inverse * (x[i] - start), 0.0, 3.0), mask=inside)
    else:
        scale, inverse = fit_symmetric(x, weights, 4.0, 16)
        for i in tl.static_range(16):
            code = tl.where(inverse == 0, -4.0, nearest(inverse * x[i], -4.0, 3.0))
            tl.store(codes + place + i, code, mask=inside)
    tl.store(found + block, scale, mask=inside)
    tl.store(found + 2 * total + block, _sum(weights), mask=inside)


@triton.jit
def _super_blocks(found, units, steps, supers, affine: tl.constexpr, threads: tl.constexpr):
    """``units [2, supers]`` gets d and dmin, ``steps [2, supers * 16]`` their multiples."""
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < supers
    total = supers * 16
    scales = load(found, block * 16, inside, 16, 1)
    sums = load(found + 2 * total, block * 16, inside, 16, 1)
    if affine:
        d, counts = fit_positive(scales, sums, 15.0, 16)
        dmin, minima = fit_positive(load(found + total, block * 16, inside, 16, 1), sums, 15.0, 16)
        tl.store(units + supers + block, dmin, mask=inside)
        for i in tl.static_range(16):
            tl.store(steps + block * 16 + i, counts[i], mask=inside)
            tl.store(steps + total + block * 16 + i, minima[i], mask=inside)
    else:
        d, inverse = fit_symmetric(scales, sums, 32.0, 16)
        for i in tl.static_range(16):
            count = tl.where(inverse == 0, -32.0, nearest(inverse * scales[i], -32.0, 31.0))
            tl.store(steps + block * 16 + i, count, mask=inside)
    tl.store(units + block, d, mask=inside)


def search(weight: Tensor, type_name: str, row: Tensor) -> Searched:
    """Q2_K and Q3_K: ``weight [out, in]`` contiguous, ``row [in]`` float32."""
    supers, affine = weight.numel() // 256, type_name == "Q2_K"
    found, codes = (weight.new_zeros(count, supers * 16, dtype=torch.float32) for count in (3, 16))
    units, steps = (weight.new_zeros(2, count, dtype=torch.float32) for count in (supers, supers * 16))
    _sub_blocks[launch_grid(supers * 16)](
        weight, row, found, codes, supers * 16, weight.shape[1], affine, LOW.first, LOW.step, LOW.last, THREADS,
        **LAUNCH,
    )  # fmt: skip
    _super_blocks[launch_grid(supers)](found, units, steps, supers, affine, THREADS, **LAUNCH)
    counts, minima = (one.view(supers, 16).t() for one in steps)
    return Searched(units[0], units[1], counts, minima, codes.view(supers, 16, 16).permute(2, 1, 0))


@triton.jit
def _level(x):
    """The uneven level next to ``x``; of two as near the greater."""
    found = tl.zeros_like(x) + _LOWEST
    for i in tl.static_range(15):
        found += tl.where(x >= _MIDDLES[i], _GAPS[i], 0.0)
    return found


@triton.jit
def _uneven_search(weight, importance, found, total, columns, elements: tl.constexpr, threads: tl.constexpr):
    """low_bits.fit_uneven of blocks of 32, in super-blocks of ``elements``. Values are loaded again for each scale:
    written out for 32 of them and 15 levels' bounds, it would compile for a minute."""
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < total
    place = block * 32
    sigma = tl.zeros((threads,), tl.float32)
    for i in range(elements):
        value = tl.load(weight + place // elements * elements + i, mask=inside, other=0.0).to(tl.float32)
        sigma += value * value
    sigma = sigma * (2.0 / elements)
    largest = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    for i in range(1, 32):
        value = tl.load(weight + place + i, mask=inside, other=0.0).to(tl.float32)
        largest = tl.where(tl.abs(value) > tl.abs(largest), value, largest)
    nothing = tl.abs(largest) < TINIEST
    largest = tl.where(nothing, 1.0, largest)
    first = over(1.0, tl.div_rn(-largest, tl.zeros_like(largest) + _LOWEST))
    scale, best = tl.zeros_like(largest), tl.zeros_like(largest)
    number = tl.zeros_like(largest) + (_LOWEST - _TRIES - 1.0)
    for tried in range(2 * _TRIES + 2):
        inverse = tl.where(tried == 0, first, tl.div_rn(number, largest))
        sum_qx, sum_q2 = tl.zeros_like(largest), tl.zeros_like(largest)
        for i in range(32):
            x = tl.load(weight + place + i, mask=inside, other=0.0).to(tl.float32)
            counts = tl.load(importance + place % columns + i, mask=inside, other=0.0) * tl.sqrt_rn(sigma + x * x)
            q = _level(inverse * x)
            share = counts * q
            sum_qx += share * x
            sum_q2 += share * q
        better = (sum_q2 > 0) & ((tried == 0) | (sum_qx * sum_qx > best * sum_q2))
        scale = tl.where(better, tl.div_rn(sum_qx, sum_q2), scale)
        best = tl.where(better, scale * sum_qx, best)
        number += 1.0
    tl.store(found + block, tl.where(nothing, 0.0, scale), mask=inside)


def uneven_scales(weight: Tensor, row: Tensor, elements: int) -> Tensor:
    """As `low_bits.fit_uneven`, of all blocks: ``[elements / 32, super-blocks]``."""
    total = weight.numel() // 32
    found = weight.new_empty(total, dtype=torch.float32)
    _uneven_search[launch_grid(total)](weight, row, found, total, weight.shape[1], elements, THREADS, **LAUNCH)
    return found.view(-1, elements // 32).t()
