"""The key/value cache to the byte, as each engine lays it out."""

from __future__ import annotations

from qtool import QtoolError
from qtool.convert.models.geometry import Geometry
from qtool.evaluate.engines.facts import EngineFacts


def kv_bytes(
    geometry: Geometry, engine: EngineFacts, context: int, sequences: int, kv_dtype: str, chunk: int = 0,
    cards: int = 1,
) -> int:  # fmt: skip
    """Bytes on each card for ``sequences`` of ``context`` tokens. ``chunk``: tokens of one prefill step, which sliding
    layers may hold on top of their window. ``cards``: those that share every layer; heads fewer than them are repeated.
    """
    row = geometry.kv_row if cards == 1 else max(1, geometry.kv_heads // cards) * geometry.head_dim
    tokens = sum(engine.cells(context, window, chunk) for window in cached_windows(geometry, engine))
    cache_type = engine.cache_type(kv_dtype)
    assert cache_type is not None, f"{engine.name} has no cache of {kv_dtype}; check_kv_dtype says so"
    return int(sequences * tokens * 2 * row * cache_type.width)


def token_bytes(geometry: Geometry, engine: EngineFacts, kv_dtype: str, cards: int = 1) -> int:
    """Bytes on each card for one token, where each of its caches holds it; no engine's padding counts."""
    row = geometry.kv_row if cards == 1 else max(1, geometry.kv_heads // cards) * geometry.head_dim
    cache_type = engine.cache_type(kv_dtype)
    assert cache_type is not None, f"{engine.name} has no cache of {kv_dtype}; check_kv_dtype says so"
    return int(len(cached_windows(geometry, engine)) * 2 * row * cache_type.width)


def cached_windows(geometry: Geometry, engine: EngineFacts) -> tuple[int | None, ...]:
    """One entry for each cache that a sequence has.

    A looped model keeps the first pass whole and of every further pass a window (vLLM models/iquest_loopcoder.py,
    mlx-lm models/iquestloopcoder.py).
    """
    first = geometry.windows if engine.slides(geometry) else (None,) * geometry.layers
    return first + (geometry.loop_window,) * (geometry.layers * (geometry.loops - 1))


def check_kv_dtype(geometry: Geometry, engine: EngineFacts, kv_dtype: str) -> None:
    """Raises QtoolError for a cache type that the engine does not have or the heads do not divide into."""
    cache_type = engine.cache_type(kv_dtype)
    if cache_type is None:
        known = ", ".join(known.name for known in engine.cache_types)
        raise QtoolError(f"--kv-dtype {kv_dtype}: {engine.name} keeps its cache in {known}.")
    if geometry.head_dim % cache_type.block:
        raise QtoolError(
            f"--kv-dtype {kv_dtype}: heads of {geometry.head_dim} do not divide into blocks of {cache_type.block}."
        )
