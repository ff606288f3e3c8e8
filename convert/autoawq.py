"""The AutoAWQ GEMM container (`quant_method: awq`, `version: gemm`).

Sources: AutoAWQ awq/modules/linear/gemm.py, awq/utils/packing_utils.py, awq/models/_config.py.
A linear ``[out, in]`` becomes qweight int32 ``[in, out/8]``, qzeros int32 ``[in/g, out/8]``, scales ``[in/g, out]``;
both packed along OUT in AWQ order; ``w = (q - z) * s``; zeros stored as they are (no -1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qtool.convert.codes import UniformCodes
from qtool.convert.packing import AWQ_ORDER, pack_nibbles, unpack_nibbles

SUFFIXES = ("qweight", "qzeros", "scales")


def specs(out: int, columns: int, group_size: int, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of the tensors that replace one ``.weight``."""
    groups = columns // group_size
    return {
        "qweight": (torch.int32, (columns, out // 8)),
        "qzeros": (torch.int32, (groups, out // 8)),
        "scales": (dtype, (groups, out)),
    }


def pack(codes: UniformCodes) -> dict[str, torch.Tensor]:
    """Suffix -> tensor for one linear."""
    return {
        "qweight": pack_nibbles(codes.codes.t().contiguous(), AWQ_ORDER),
        "qzeros": pack_nibbles(codes.zero.t().contiguous(), AWQ_ORDER),
        "scales": codes.scale.t().contiguous(),
    }


def unpack(tensors: Mapping[str, torch.Tensor], group_size: int) -> UniformCodes:
    """Inverse of `pack`."""
    return UniformCodes(
        codes=unpack_nibbles(tensors["qweight"], AWQ_ORDER).t().contiguous(),
        scale=tensors["scales"].t().contiguous(),
        zero=unpack_nibbles(tensors["qzeros"], AWQ_ORDER).t().contiguous(),
        bits=4,
        group_size=group_size,
    )


def quantization_config(group_size: int, skipped: list[str]) -> dict[str, Any]:
    """The section that loaders look for in config.json."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": skipped or None,
    }
