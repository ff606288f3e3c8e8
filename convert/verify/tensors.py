"""What makes a tensor no part of a model. Its numbers alone count: whoever made a file may have written its manifest
too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from qtool.convert.artifact import Artifact
from qtool.convert.models.table import find_family

Result = tuple[str, list[str], str]
Check = Callable[[Artifact], Result]
FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LARGEST = 65504.0  # beyond it, kernels that compute in float16 see infinity
PLAIN_TOLERANCE = 0.02  # of what is not quantized, rounded to 16 bits once or twice
ZEROS = 0.99  # of a matrix's weights: nothing is left of it


def hollow(name: str, weight: torch.Tensor) -> Iterator[str]:
    """Ways in which a matrix, dequantized, holds nothing of a model."""
    low, high = (float(value) for value in weight.aminmax()) if weight.numel() else (0.0, 0.0)
    zeros = float((weight == 0).float().mean()) if weight.numel() else 1.0
    if not (abs(low) <= LARGEST and abs(high) <= LARGEST):  # NaN too
        yield f"{name} has weights from {low:.4g} to {high:.4g}: float16 ends at {LARGEST:.0f}"
    elif low == high == 0:
        yield f"{name} is all zero"
    elif low == high:
        yield f"{name} is {low:.4g} throughout"
    elif zeros > ZEROS:
        yield f"{name} is zero but for {1 - zeros:.2%} of its weights"


def plain_faults(name: str, tensor: torch.Tensor, config: Mapping[str, Any]) -> Iterator[str]:
    """Of a tensor that is not quantized."""
    if tensor.dtype not in FLOATS.values():
        yield f"{name} is {tensor.dtype}, which is no model's weight"
    elif tensor.ndim >= 2:
        yield from hollow(name, tensor.float())
    elif name.endswith("norm.weight") and not norm_offset(name, config) and not bool(tensor.any()):
        yield f"{name} is all zero"


def norm_offset(name: str, config: Mapping[str, Any]) -> float:
    """What the norm of a weight adds to it before it applies it; 0 where config.json is of no known family."""
    family = find_family(config)
    return family.norm_offset(name) if family else 0.0
