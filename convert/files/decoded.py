"""Checkpoints whose matrices are stored in float8 or MXFP4 with scales: read as 16-bit floats, a part at a time.

    DeepSeek's float8       weight (E4M3), weight_scale_inv: a factor for a block of rows and columns, or for all
    compressed-tensors'     weight (E4M3), weight_scale: a factor for a row, a block or all
    gpt-oss's MXFP4         NAME_blocks [..., in / 32, 16], NAME_scales [..., in / 32], of a tensor NAME
    compressed-tensors'     weight_packed [out, in / 2], weight_scale [out, in / 32]

Scales of activations are left out: outputs compute with 16-bit activations. What is read is the model that all
comparisons are held against: what its makers lost when they rounded is not charged to an output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.diagnosis import UNQUANTIZED
from qtool.convert.files.reading import shown
from qtool.convert.files.small_floats import SECTION, group_weights, section_of, small_floats_of
from qtool.convert.files.tensor_info import MX_BLOCK, Float8, Mxfp4, TensorInfo

SCALES = ("weight_scale_inv", "weight_scale")
_ACTIVATIONS = ("input_scale", "activation_scale", "input_activation_scale", "input_global_scale")
# how the name of a tensor's codes ends -> of the tensor itself, and of its scales
_MX = {"_blocks": ("", "_scales"), ".weight_packed": (".weight", ".weight_scale")}
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def in_16_bits(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """A float8 or MXFP4 checkpoint's tensors as they are read; those of any other checkpoint as they are. Raises
    QtoolError naming a matrix without scales, with scales of another kind or shape than its blocks, rows or one, or
    that is stored twice."""
    if not (how := small_floats_of(config)):
        return dict(tensors)
    if tensors and not any(info.dtype.itemsize == 1 for info in tensors.values()):
        file = next(iter(tensors.values())).file
        raise QtoolError(
            f"{file.parent / 'config.json'}: says that matrices are stored in 4 or 8 bits ({how}), and no shard holds "
            f"one. {UNQUANTIZED}, or remove {SECTION} if this is it."
        )
    found = _mxfp4(tensors, config) if "mxfp4" in how else _float8(tensors, config)
    for name, info in found.items():
        if info.small is None and info.dtype.itemsize == 1:
            raise QtoolError(f"{info.file}: {shown(name)} is stored in 8 bits, and {how} does not say what they are.")
    return dict(sorted(found.items()))


def _float8(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    said = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    dtype = {"float16": torch.float16, "float32": torch.float32}.get(said, torch.bfloat16)
    found = {}
    for name, info in tensors.items():
        module, _, last = name.rpartition(".")
        scaled = tensors.get(f"{module}.weight")
        if scaled is not None and last in SCALES and scaled.dtype.itemsize > 1:
            raise QtoolError(
                f"{info.file}: holds {shown(name)}, scales of a weight stored in {8 * scaled.dtype.itemsize} bits. "
                "Whether they are in it already cannot be told."
            )
        if scaled is not None and last in (*SCALES, *_ACTIVATIONS):
            continue
        found[name] = _scaled(name, info, tensors, config, dtype) if info.dtype.itemsize == 1 else info
    return found


def _scaled(
    name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], dtype: torch.dtype
) -> TensorInfo:
    module = name.removesuffix(".weight")
    found = [f"{module}.{last}" for last in SCALES if f"{module}.{last}" in tensors]
    if len(found) > 1:
        raise QtoolError(f"{info.file}: {shown(name)} has scales under two names, {' and '.join(found)}. Which are the "
                         "model's cannot be told.")  # fmt: skip
    scale = next(iter(found), None)
    if info.dtype != torch.float8_e4m3fn or len(info.shape) != 2 or scale is None:
        raise QtoolError(f"{info.file}: {shown(name)} is stored in 8 bits, and no tensor says its scales.")
    scales = tensors[scale]
    if scales.dtype not in _SCALE_DTYPES:
        raise QtoolError(f"{scales.file}: {shown(scale)} is stored as {scales.dtype}; scales of float8 are floats of "
                         "16 or 32 bits.")  # fmt: skip
    section = section_of(config)
    size = section.get("weight_block_size") or next(
        (weights.get("block_structure") for weights in group_weights(section)), None
    )
    block = (1, info.shape[1])
    if size is not None:
        if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
            raise QtoolError(f"config.json: weight_block_size is {size!r}; two positive whole numbers are needed.")
        block = (size[0], size[1])
    places = (-(-info.shape[0] // block[0]), -(-info.shape[1] // block[1]))
    one_a_row = places[1] == 1 and scales.shape == places[:1]
    if scales.shape != places and not one_a_row and prod(scales.shape) != 1:
        raise QtoolError(
            f"{scales.file}: {shown(scale)} has shape {list(scales.shape)}; {list(info.shape)} weights in blocks of "
            f"{block[0]} x {block[1]} have {list(places)} scales, or one."
        )
    return replace(info, dtype=dtype, small=Float8(info.named(name), scales.named(scale), block))


def _mxfp4(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """In bfloat16, which holds every value of MXFP4 as it is, or in float32 where the model is."""
    said = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    dtype = torch.float32 if said == "float32" else torch.bfloat16
    found = dict(tensors)
    for name, info in tensors.items():
        end = next((end for end in _MX if name.endswith(end) and info.dtype == torch.uint8), None)
        if end is None:
            continue
        stem = name.removesuffix(end)
        whole, scale = (stem + last for last in _MX[end])
        if whole in tensors:
            raise QtoolError(f"{info.file}: holds {shown(name)}, and {shown(whole)} is stored too. Which one is the "
                             "model's cannot be told: remove one of them.")  # fmt: skip
        if scale not in tensors:
            raise QtoolError(f"{info.file}: {shown(name)} is stored in MXFP4, and no tensor {shown(scale)} says its "
                             "scales.")  # fmt: skip
        found[whole] = _packed(name, info, scale, tensors[scale], dtype)
        for gone in (name, scale, *(f"{stem}.{last}" for last in _ACTIVATIONS)):
            found.pop(gone, None)
    return found


def _packed(name: str, info: TensorInfo, scale: str, scales: TensorInfo, dtype: torch.dtype) -> TensorInfo:
    blocks = name.endswith("_blocks")  # of 16 bytes, along an axis of their own
    rows = info.shape[: -2 if blocks else -1]
    width = 2 * prod(info.shape[len(rows) :])
    whole_blocks = width % MX_BLOCK == 0 and (not blocks or info.shape[-1] == MX_BLOCK // 2)
    expected = (*rows, width // MX_BLOCK)
    if not rows or not whole_blocks or scales.shape != expected or scales.dtype != torch.uint8:
        raise QtoolError(
            f"{scales.file}: {shown(scale)} is {list(scales.shape)} in {scales.dtype}; {shown(name)} of "
            f"{list(info.shape)} bytes wants {list(expected)} in torch.uint8, one for {MX_BLOCK} values."
        )
    codes = replace(info.named(name), shape=(*rows, width // 2))
    return TensorInfo(info.file, dtype, (*rows, width), small=Mxfp4(codes, scales.named(scale)))
