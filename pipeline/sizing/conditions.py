"""What a cache holds under a condition, to the byte: numbers and their scales, of all layers, without any engine's
padding."""

from __future__ import annotations

from qtool import QtoolError
from qtool.convert.models.geometry import Geometry
from qtool.evaluate.engines.condition import Condition
from qtool.evaluate.engines.facts import BF16, F16, FP8, Q4_0, Q8_0, CacheType

TYPES: dict[str, CacheType] = {kind.name: kind for kind in (BF16, F16, FP8, Q8_0, Q4_0)}


def cache_bytes(geometry: Geometry, condition: Condition, length: int) -> int:
    """Bytes that one sequence of ``length`` tokens keeps; without a type 16 bits a number. A layer that slides keeps
    its window."""
    width = TYPES[condition.cache or BF16.name].width
    held = length if condition.held is None else min(length, condition.held)
    tokens = sum(held if window is None else min(held, window) for window in geometry.windows)
    return int(tokens * 2 * geometry.kv_row * width)


def require_condition(geometry: Geometry, condition: Condition) -> None:
    """Raises QtoolError for a type whose blocks do not divide the heads, and for a window of a model whose layers
    slide by themselves."""
    block = TYPES[condition.cache].block if condition.cache else 1
    if geometry.head_dim % block:
        raise QtoolError(
            f"conditions: cache {condition.cache}: heads of {geometry.head_dim} do not divide into blocks of {block}; "
            f"{', '.join(name for name, kind in TYPES.items() if geometry.head_dim % kind.block == 0)} are kept."
        )
    if condition.recent and any(window is not None for window in geometry.windows):
        raise QtoolError("conditions: window: layers of this model slide by themselves; leave out `window:`.")
