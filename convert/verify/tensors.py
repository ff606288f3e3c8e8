"""What makes a tensor no part of a model. Its numbers alone count: whoever made a file may have written its manifest
too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qtool.convert.artifact import Artifact
from qtool.convert.formats.codes import Codes
from qtool.convert.models.table import find_family

Result = tuple[str, list[str], str]
Check = Callable[[Artifact], Result]
CPU = torch.device("cpu")
FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LARGEST = 65504.0  # beyond it, kernels that compute in float16 see infinity
PLAIN_TOLERANCE = 0.02  # of what is not quantized, rounded to 16 bits once or twice
# Weights that are dequantized at a time: on a processor as many as stay in its cache, a third of the time.
PIECE = {"cpu": 1 << 19, "cuda": 1 << 25}
ZEROS = 0.99  # of a matrix's weights: nothing is left of it


@dataclass(frozen=True)
class Seen:
    """Of a tensor's numbers: how many, how many zeros, the smallest and the largest (NaN where one is)."""

    count: int = 0
    zeros: int = 0
    low: float = math.inf
    high: float = -math.inf

    @property
    def finite(self) -> bool:
        return self.count == 0 or (math.isfinite(self.low) and math.isfinite(self.high))

    def with_(self, other: Seen) -> Seen:
        """Of both."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        if any(map(math.isnan, (self.low, self.high, other.low, other.high))):  # which compares with nothing
            low = high = math.nan
        return Seen(self.count + other.count, self.zeros + other.zeros, low, high)


def see(pieces: Iterable[torch.Tensor]) -> Seen:
    """A tensor that comes in pieces."""
    seen = Seen()
    for piece in pieces:
        if piece.numel():
            low, high = (float(value) for value in piece.aminmax())
            seen = seen.with_(Seen(piece.numel(), piece.numel() - int(piece.count_nonzero()), low, high))
    return seen


def see_codes(codes: Codes) -> Seen:
    """The weights that codes stand for, a piece at a time, where the codes lie."""
    return see(piece.dequantize() for piece in codes.pieces(PIECE[codes.device.type]))


def hollow(name: str, seen: Seen) -> Iterator[str]:
    """Ways in which a matrix, dequantized, holds nothing of a model."""
    low, high = (seen.low, seen.high) if seen.count else (0.0, 0.0)
    zeros = seen.zeros / seen.count if seen.count else 1.0
    if not (abs(low) <= LARGEST and abs(high) <= LARGEST):  # NaN too
        yield f"{name} has weights from {low:.4g} to {high:.4g}: float16 ends at {LARGEST:.0f}"
    elif low == high == 0:
        yield f"{name} is all zero"
    elif low == high:
        yield f"{name} is {low:.4g} throughout"
    elif zeros > ZEROS:
        yield f"{name} is zero but for {1 - zeros:.2%} of its weights"


def plain_faults(
    name: str, dtype: torch.dtype, dimensions: int, seen: Seen, config: Mapping[str, Any]
) -> Iterator[str]:
    """Of a tensor that is not quantized."""
    if dtype not in FLOATS.values():
        yield f"{name} is {dtype}, which is no model's weight"
    elif dimensions >= 2:
        yield from hollow(name, seen)
    elif name.endswith("norm.weight") and not norm_offset(name, config) and seen.zeros == seen.count:
        yield f"{name} is all zero"


def norm_offset(name: str, config: Mapping[str, Any]) -> float:
    """What the norm of a weight adds to it before it applies it; 0 where config.json is of no known family."""
    family = find_family(config)
    return family.norm_offset(name) if family else 0.0
