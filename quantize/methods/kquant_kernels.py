"""Triton kernels that put weights into llama.cpp's super-blocks (Q4_K, Q5_K, Q6_K); what each does is what kquants.py
does in plain PyTorch. Three launches:

_affine_search, _symmetric_search   a thread per sub-block: its scale (and minimum), and the codes' own scale
_affine_scales, _symmetric_scales   a thread per super-block: the scales' scale, stored; the steps that result
_affine_codes, _symmetric_codes     a thread per few words: codes at the stored steps, packed
"""

from __future__ import annotations

# Kernels carry no annotations: Triton would compile them (pyproject.toml tells mypy).
import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.convert.formats.gguf.ggml import BLOCKS, row_bytes
from qtool.quantize.methods.block_kernels import LAUNCH, THREADS, launch_grid, quantize_blocks
from qtool.quantize.methods.block_search import (
    FLOAT_MAX,
    TINIEST,
    bits,
    fit_affine,
    fit_positive,
    fit_symmetric,
    load,
    nearest,
    over,
    signed_largest,
    sum_squares,
    to_half,
)
from qtool.quantize.methods.kquant_candidates import PLAIN, WEIGHED


@triton.jit
def _weigh(weight, importance, place, super, column, x, inside, weighed: tl.constexpr):
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
        mean = tl.sqrt_rn(sum_squares(x, 32) * 0.03125)
        for i in tl.static_range(32):
            weights += (mean + tl.abs(x[i]),)
    return weights


@triton.jit
def _affine_search(
    weight, importance, found, total, columns, levels: tl.constexpr, first: tl.constexpr, step: tl.constexpr,
    last: tl.constexpr, weighed: tl.constexpr, threads: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < total
    place = block * 32
    x = load(weight, place, inside, 32, 1)
    weights = _weigh(weight, importance, place, block // 8 * 256, place % columns, x, inside, weighed)
    scale, minimum, sums, inverse, start = fit_affine(x, weights, levels, first, step, last, 32)
    tl.store(found + block, scale, mask=inside)
    tl.store(found + total + block, minimum, mask=inside)
    tl.store(found + 2 * total + block, sums, mask=inside)
    tl.store(found + 3 * total + block, inverse, mask=inside)
    tl.store(found + 4 * total + block, start, mask=inside)


@triton.jit
def _largest_scale(x):
    """kquants._largest_scale for eight values a thread."""
    largest = tl.maximum(x[0], 0.0)
    for i in tl.static_range(1, 8):
        largest = tl.maximum(largest, x[i])
    inverse = tl.where(largest > 63.0 / FLOAT_MAX, over(63.0, largest), 0.0)
    codes = ()
    for i in tl.static_range(8):
        codes += (nearest(inverse * x[i], 0.0, 63.0),)
    return tl.div_rn(largest, tl.zeros_like(largest) + 63.0), codes


@triton.jit
def _affine_scales(found, out, supers, words: tl.constexpr, weighed: tl.constexpr, threads: tl.constexpr):
    """Sixteen bytes of header: d, dmin, eight scales and minima of six bits; found's first two rows become steps."""
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < supers
    total = supers * 8
    scales = load(found, block * 8, inside, 8, 1)
    minima = load(found + total, block * 8, inside, 8, 1)
    if weighed:
        sums = load(found + 2 * total, block * 8, inside, 8, 1)
        d, ls = fit_positive(scales, sums, 63.0, 8)
        dmin, lm = fit_positive(minima, sums, 63.0, 8)
    else:
        d, ls = _largest_scale(scales)
        dmin, lm = _largest_scale(minima)
    d, dmin = to_half(d), to_half(dmin)
    head = out + block * words
    tl.store(head, bits(d) | bits(dmin) << 16, mask=inside)
    low, mid, high = tl.zeros_like(bits(d)), tl.zeros_like(bits(d)), tl.zeros_like(bits(d))
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
def _affine_codes(weight, found, out, supers, words: tl.constexpr, five: tl.constexpr, threads: tl.constexpr):
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
        x = load(weight, block * 256 + s * 32 + part * 4, inside, 4, 1)
        for i in tl.static_range(4):
            searched = nearest(inverse * (x[i] - start), 0.0, levels)
            divisor = tl.where(step == 0, 1.0, step)
            code = tl.where(step == 0, searched, nearest(tl.div_rn(x[i] + offset, divisor), 0.0, levels)).to(tl.int32)
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
def _symmetric_search(weight, importance, found, total, columns, weighed: tl.constexpr, threads: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < total
    place = block * 16
    x = load(weight, place, inside, 16, 1)
    weights = ()
    for i in tl.static_range(16):
        if weighed:
            weights += (tl.load(importance + place % columns + i, mask=inside, other=0.0),)
        else:
            weights += (x[i] * x[i],)
    scale, inverse = fit_symmetric(x, weights, 32.0, 16)
    tl.store(found + block, scale, mask=inside)
    tl.store(found + total + block, inverse, mask=inside)


@triton.jit
def _symmetric_scales(found, out, supers, threads: tl.constexpr):
    """d and sixteen signed bytes; found's first row becomes steps, its second is 0 where the super-block is."""
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < supers
    scales = load(found, block * 16, inside, 16, 1)
    largest = signed_largest(scales, 16)
    nothing = tl.abs(largest) < TINIEST
    inverse = over(-128.0, tl.where(nothing, 1.0, largest))
    d = tl.where(nothing, 0.0, to_half(over(1.0, inverse)).to(tl.float32)).to(tl.float16)
    head = out + block * 105 + 96
    for i in tl.static_range(8):
        a = tl.where(nothing, 0.0, nearest(inverse * scales[2 * i], -128.0, 127.0))
        b = tl.where(nothing, 0.0, nearest(inverse * scales[2 * i + 1], -128.0, 127.0))
        pair = a.to(tl.int32) & 255 | (b.to(tl.int32) & 255) << 8
        tl.store(head + i, pair.to(tl.int16), mask=inside)
        tl.store(found + block * 16 + 2 * i, d.to(tl.float32) * a, mask=inside)
        tl.store(found + block * 16 + 2 * i + 1, d.to(tl.float32) * b, mask=inside)
        tl.store(found + supers * 16 + block * 16 + 2 * i, 0.0, mask=inside & nothing)
        tl.store(found + supers * 16 + block * 16 + 2 * i + 1, 0.0, mask=inside & nothing)
    tl.store(head + 8, d.to(tl.int16, bitcast=True), mask=inside)


@triton.jit
def _symmetric_codes(weight, found, out, supers, threads: tl.constexpr):
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
        x = load(weight, block * 256 + half * 128 + s * 32 + part * 2, inside, 2, 1)
        word = tl.zeros_like(part)
        for i in tl.static_range(2):
            searched = tl.where(inverse == 0, -32.0, nearest(inverse * x[i], -32.0, 31.0))
            divisor = tl.where(step == 0, 1.0, step)
            code = tl.where(step == 0, searched, nearest(tl.div_rn(x[i], divisor), -32.0, 31.0)).to(tl.int32) + 32
            word |= (code & 15) << 8 * i
            high |= code >> 4 << 8 * i + 2 * s
        quarters += (word,)
    place = out + block * 105 + half * 32 + part
    tl.store(place, (quarters[0] | quarters[2] << 4).to(tl.int16), mask=inside)
    tl.store(place + 16, (quarters[1] | quarters[3] << 4).to(tl.int16), mask=inside)
    tl.store(out + block * 105 + 64 + half * 16 + part, high.to(tl.int16), mask=inside)


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
        _affine_search[launch_grid(blocks * 8)](
            weight, importance, found, blocks * 8, columns, search.levels, search.first, search.step, search.last,
            weighed, THREADS, **LAUNCH,
        )  # fmt: skip
        _affine_scales[launch_grid(blocks)](found, target, blocks, words, weighed, THREADS, **LAUNCH)
        five = type_name == "Q5_K"
        _affine_codes[launch_grid(blocks * 8)](weight, found, target, blocks, words, five, THREADS, **LAUNCH)
        return data
    target = data.view(torch.int16)
    if type_name != "Q6_K":
        quantize_blocks(weight, type_name, row, target)
        return data
    found = weight.new_empty(2, blocks * 16, dtype=torch.float32)
    _symmetric_search[launch_grid(blocks * 16)](
        weight, importance, found, blocks * 16, columns, weighed, THREADS, **LAUNCH
    )
    _symmetric_scales[launch_grid(blocks)](found, target, blocks, THREADS, **LAUNCH)
    _symmetric_codes[launch_grid(blocks * 32)](weight, found, target, blocks, THREADS, **LAUNCH)
    return data
