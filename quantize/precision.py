"""Faster matrix products of float32 values: what each may lose, and on which device it is available."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

X86 = ("x86_64", "AMD64")  # what `platform.machine` calls it on Linux and on Windows


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32: whether it has instructions for that.

    oneDNN calls it supported on every processor with AVX-512, and takes four times as long as for float32 where it must
    emulate it (Ice Lake: 4096 x 576 by 576 x 1536 in 133 ms, in float32 in 32).
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return platform.machine() not in X86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """While open, products of float32 matrices on the CPU may round their factors (not their sums) to bfloat16."""
    with _matmul_precision("medium"):
        yield


@contextmanager
def tensor_float32() -> Iterator[None]:
    """TF32 products on an accelerator: 2e-4 off, enough for losses of plain roundings, not of compensated ones."""
    with _matmul_precision("high"):
        yield


@contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, of matrices or stacks of them. On an accelerator, unless TF32 was asked for, to float32's
    accuracy from three TF32 products of the factors' first eleven bits and of what these leave over; the two rests' own
    product (2^-22) is left out."""
    if not left.is_cuda or torch.get_float32_matmul_precision() != "highest":
        return left @ right
    left_high, right_high = _first_bits(left), _first_bits(right)
    with tensor_float32():
        product = (left - left_high) @ right_high
        add_product(product, left_high, right - right_high)
        return add_product(product, left_high, right_high)


def each_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``; of one matrix and several pieces ``[pieces, m, out]`` a product for each, so that a piece's
    numbers do not depend on how many there are."""
    if left.ndim == right.ndim:
        return left @ right
    product = right.new_empty(len(right), left.shape[0], right.shape[-1])
    for one, found in zip(right, product, strict=True):
        torch.mm(left, one, out=found)
    return product


def subtract_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total -= left @ right``, as accurate as `float32_product`; on an accelerator in one TF32 product three times as
    deep, because ``total`` is what is large."""
    if not left.is_cuda:
        add_product(total, left, right, -1)
        return
    left_high, right_high = _first_bits(left), _first_bits(right)
    deep = torch.cat([left - left_high, left_high, left_high], -1)
    with tensor_float32():
        add_product(total, deep, torch.cat([right_high, right - right_high, right_high], -2), -1)


def add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1) -> Tensor:
    """``total += alpha * left @ right``, of matrices or of stacks of them, or of one matrix and several pieces."""
    if total.ndim == 2:
        return total.addmm_(left, right, alpha=alpha)
    if left.ndim == 2:
        for one, part in zip(total, right, strict=True):
            one.addmm_(left, part, alpha=alpha)
        return total
    return total.baddbmm_(left, right, alpha=alpha)


def add_outer(total: Tensor, column: Tensor, row: Tensor) -> None:
    """``total += column rowᵀ`` of two vectors, or of stacks of them."""
    if total.ndim == 2:
        total.addr_(column, row)
    else:
        total.baddbmm_(column.unsqueeze(-1), row.unsqueeze(-2))


def _first_bits(values: Tensor) -> Tensor:
    """What TF32 holds of float32 values."""
    return (values.contiguous().view(torch.int32) & -0x2000).view(torch.float32)
