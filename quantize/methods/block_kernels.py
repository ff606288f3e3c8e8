"""Triton kernels for llama.cpp's blocks of 32 values (Q5_0, Q5_1, Q8_0): a thread a block, one launch."""

from __future__ import annotations

# Kernels carry no annotations: Triton would compile them (pyproject.toml tells mypy).
import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.quantize.methods.block_search import (
    FLOAT_MAX,
    fit_affine,
    fit_symmetric,
    load,
    nearest,
    over,
    signed_largest,
    to_half,
)

THREADS = 128
LAUNCH = {"num_warps": THREADS // 32, "enable_fp_fusion": False}


@triton.jit
def _mean_squares(weight, found, rows, columns, threads: tl.constexpr):
    """A thread a row, one column after another."""
    row = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = row < rows
    total = tl.zeros((threads,), tl.float32)
    for column in range(columns):
        value = tl.load(weight + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        total += value * value
    tl.store(found + row, tl.div_rn(total, tl.zeros_like(total) + columns), mask=inside)


@triton.jit
def _weigh_by_row(importance, sigma, place, columns, x, inside):
    mean = tl.load(sigma + place // columns, mask=inside, other=0.0)
    weights = ()
    for i in tl.static_range(32):
        row = tl.load(importance + place % columns + i, mask=inside, other=0.0)
        weights += (row * tl.sqrt_rn(mean + x[i] * x[i]),)
    return weights


@triton.jit
def _store_five_bits(out, codes, inside):
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
def _five_bits(weight, importance, sigma, out, total, columns, weighed: tl.constexpr, threads: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < total
    place = block * 32
    x = load(weight, place, inside, 32, 1)
    codes = ()
    if weighed:
        d, inverse = fit_symmetric(x, _weigh_by_row(importance, sigma, place, columns, x, inside), 16.0, 32)
        for i in tl.static_range(32):
            code = tl.where(inverse == 0, 0.0, nearest(inverse * x[i], -16.0, 15.0) + 16.0)
            codes += (code.to(tl.int32),)
    else:
        d = signed_largest(x, 32) * -0.0625
        inverse = tl.where(tl.abs(d) < 1.0 / FLOAT_MAX, 0.0, over(1.0, d))
        for i in tl.static_range(32):
            codes += (tl.minimum(tl.maximum(x[i] * inverse + 16.5, 0.0), 31.0).to(tl.int32),)
    tl.store(out + block * 11, to_half(d).to(tl.int16, bitcast=True), mask=inside)
    _store_five_bits(out + block * 11 + 1, codes, inside)


@triton.jit
def _five_bits_affine(weight, importance, sigma, out, total, columns, weighed: tl.constexpr, threads: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < total
    place = block * 32
    x = load(weight, place, inside, 32, 1)
    codes = ()
    if weighed:
        weights = _weigh_by_row(importance, sigma, place, columns, x, inside)
        d, minimum, _, inverse, start = fit_affine(x, weights, 31, -0.9, 0.05, 36, 32)
        low = 0.0 - minimum
        for i in tl.static_range(32):
            codes += (nearest(inverse * (x[i] - start), 0.0, 31.0).to(tl.int32),)
    else:
        low, high = x[0], x[0]
        for i in tl.static_range(1, 32):
            low, high = tl.minimum(low, x[i]), tl.maximum(high, x[i])
        d = tl.div_rn(high - low, tl.zeros_like(low) + 31.0)
        inverse = tl.where(d < 1.0 / FLOAT_MAX, 0.0, over(1.0, d))
        for i in tl.static_range(32):
            codes += (tl.minimum(tl.maximum((x[i] - low) * inverse + 0.5, 0.0), 31.0).to(tl.int32),)
    tl.store(out + block * 12, to_half(d).to(tl.int16, bitcast=True), mask=inside)
    tl.store(out + block * 12 + 1, to_half(low).to(tl.int16, bitcast=True), mask=inside)
    _store_five_bits(out + block * 12 + 2, codes, inside)


@triton.jit
def _eight_bits(weight, out, total, threads: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * threads + tl.arange(0, threads)
    inside = block < total
    x = load(weight, block * 32, inside, 32, 1)
    d = tl.abs(signed_largest(x, 32))
    d = tl.div_rn(d, tl.zeros_like(d) + 127.0)
    inverse = tl.minimum(tl.where(d == 0, 0.0, over(1.0, tl.where(d == 0, 1.0, d))), FLOAT_MAX)
    tl.store(out + block * 17, to_half(d).to(tl.int16, bitcast=True), mask=inside)
    for i in tl.static_range(16):
        pair = tl.zeros_like(inside.to(tl.int32))
        for j in tl.static_range(2):
            scaled = x[2 * i + j] * inverse
            size = tl.minimum(tl.abs(scaled), 127.0)
            whole = tl.floor(size)
            code = tl.where(size - whole >= 0.5, whole + 1.0, whole)
            pair |= (tl.where(scaled < 0, -code, code).to(tl.int32) & 255) << 8 * j
        tl.store(out + block * 17 + 1 + i, pair.to(tl.int16), mask=inside)


def quantize_blocks(weight: Tensor, type_name: str, row: Tensor | None, words: Tensor) -> None:
    """``weight [out, in]`` contiguous, ``row [in]`` float32, into ``words``: int16, the blocks one after another."""
    out, columns = weight.shape
    total = weight.numel() // 32
    if type_name == "Q8_0":
        _eight_bits[launch_grid(total)](weight, words, total, THREADS, **LAUNCH)
        return
    sigma = weight.new_empty(out, dtype=torch.float32)
    if row is not None:
        _mean_squares[launch_grid(out)](weight, sigma, out, columns, THREADS, **LAUNCH)
    kernel, importance = _five_bits if type_name == "Q5_0" else _five_bits_affine, weight if row is None else row
    kernel[launch_grid(total)](weight, importance, sigma, words, total, columns, row is not None, THREADS, **LAUNCH)


def launch_grid(threads: int) -> tuple[int]:
    """Programs for so many threads."""
    return (triton.cdiv(threads, THREADS),)
