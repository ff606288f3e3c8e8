"""Checkpoints whose matrices are stored in float8 with scales: read as 16-bit floats, a part at a time.

Two spellings: DeepSeek's (`quant_method: fp8`, a factor `weight_scale_inv` for every block of 128 rows and columns, or
one for the whole matrix), and compressed-tensors' (`format: float-quantized`, `weight_scale` for a row, a block or the
matrix). Scales of activations are left out: outputs compute with 16-bit activations. What is read is the model that all
comparisons are held against: what its makers lost when they rounded is not charged to an output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import Scaled, TensorInfo
from qtool.convert.files.diagnosis import UNQUANTIZED
from qtool.convert.files.float8 import SECTION, float8_of
from qtool.convert.files.reading import shown

SCALES = ("weight_scale_inv", "weight_scale")
_ACTIVATIONS = ("input_scale", "activation_scale", "input_activation_scale")


def in_16_bits(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """A float8 checkpoint's tensors as they are read; those of any other checkpoint as they are. Raises QtoolError
    naming a matrix without scales, or with scales of another shape than its blocks, rows or one."""
    if not (how := float8_of(config)):
        return dict(tensors)
    if tensors and not any(info.dtype.itemsize == 1 for info in tensors.values()):
        file = next(iter(tensors.values())).file
        raise QtoolError(
            f"{file.parent / 'config.json'}: says that matrices are stored in float8 ({how}), and no shard holds one. "
            f"{UNQUANTIZED}, or remove {SECTION} if this is it."
        )
    said = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    dtype = {"float16": torch.float16, "float32": torch.float32}.get(said, torch.bfloat16)
    found = {}
    for name, info in tensors.items():
        module, _, last = name.rpartition(".")
        if f"{module}.weight" in tensors and last in (*SCALES, *_ACTIVATIONS):
            continue
        found[name] = _scaled(name, info, tensors, config, dtype) if info.dtype.itemsize == 1 else info
    return found


def _scaled(
    name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], dtype: torch.dtype
) -> TensorInfo:
    module = name.removesuffix(".weight")
    scale = next((f"{module}.{last}" for last in SCALES if f"{module}.{last}" in tensors), None)
    if info.dtype != torch.float8_e4m3fn or len(info.shape) != 2 or scale is None:
        raise QtoolError(f"{info.file}: {shown(name)} is stored in 8 bits, and no tensor says its scales.")
    section = config.get(SECTION) or config.get("compression_config") or {}
    size = section.get("weight_block_size") or _block(section)
    block = (int(size[0]), int(size[1])) if isinstance(size, list) and len(size) == 2 else (1, info.shape[1])
    if min(block) < 1:
        raise QtoolError(f"config.json: weight_block_size is {size!r}; two positive whole numbers are needed.")
    places = (-(-info.shape[0] // block[0]), -(-info.shape[1] // block[1]))
    held = tensors[scale].shape
    count = 1
    for length in held:
        count *= length
    if held != places and held != places[:1] and count != 1:
        raise QtoolError(
            f"{tensors[scale].file}: {shown(scale)} has shape {list(held)}; {list(info.shape)} weights in blocks of "
            f"{block[0]} x {block[1]} have {list(places)} scales, or one."
        )
    return replace(info, dtype=dtype, scaled=Scaled(info.dtype, scale, tensors[scale], block))


def _block(section: Mapping[str, Any]) -> Any:
    groups = section.get("config_groups")
    first: Any = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
    weights = first.get("weights") if isinstance(first, Mapping) else None
    return weights.get("block_structure") if isinstance(weights, Mapping) else None
