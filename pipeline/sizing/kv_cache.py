"""The key/value cache to the byte, as each engine lays it out."""

from __future__ import annotations

from fractions import Fraction

from qtool import QtoolError
from qtool.convert.models.geometry import Geometry
from qtool.sizing.workspace import UBATCH

# bytes to a number; ggml's blocks of 32 carry an fp16 scale (ggml/src/ggml-common.h)
KV_BYTES: dict[str, Fraction] = {
    "bf16": Fraction(2), "f16": Fraction(2), "fp8": Fraction(1), "q8_0": Fraction(34, 32), "q4_0": Fraction(18, 32),
}  # fmt: skip
KV_BLOCK = {"q8_0": 32, "q4_0": 32}
KV_OF: dict[str, tuple[str, ...]] = {
    "transformers": ("bf16", "f16"),
    "vllm": ("bf16", "f16", "fp8"),
    "llama.cpp": ("f16", "bf16", "q8_0", "q4_0"),
}
VLLM_BLOCK = 16  # tokens to a block (vLLM CacheConfig.block_size on CUDA)
LLAMA_CPP_PAD = 256  # cells are padded to this (llama.cpp src/llama-context.cpp, GGML_PAD(n_ctx, 256))


def kv_bytes(
    geometry: Geometry, engine: str, context: int, sequences: int, kv_dtype: str, chunk: int = 0, cards: int = 1
) -> int:
    """Bytes on each card for ``sequences`` of ``context`` tokens. ``chunk``: tokens of one prefill step, which sliding
    layers of vLLM hold on top of their window. ``cards``: tensor-parallel ranks; heads fewer than ranks are repeated.
    """
    row = geometry.kv_row
    if engine == "vllm" and cards > 1:
        row = max(1, geometry.kv_heads // cards) * geometry.head_dim
    tokens = sum(cells(engine, context, window, chunk) for window in cached_windows(geometry, engine))
    return int(sequences * tokens * 2 * row * KV_BYTES[kv_dtype])


def cached_windows(geometry: Geometry, engine: str) -> tuple[int | None, ...]:
    """One entry for each cache that a sequence has. llama.cpp ignores windows but in some families.

    A looped model keeps the first pass whole and of every further pass a window (vLLM models/iquest_loopcoder.py,
    mlx-lm models/iquestloopcoder.py).
    """
    ignored = engine == "llama.cpp" and not geometry.llama_cpp_windows
    first = (None,) * geometry.layers if ignored else geometry.windows
    return first + (geometry.loop_window,) * (geometry.layers * (geometry.loops - 1))


def cells(engine: str, context: int, window: int | None, chunk: int = 0) -> int:
    """Tokens that one cache of one sequence has room for."""
    if engine == "llama.cpp":  # a sliding layer keeps its window and one batch (src/llama-kv-cache-iswa.cpp)
        held = context if window is None else min(context, window + UBATCH)
        return -(-held // LLAMA_CPP_PAD) * LLAMA_CPP_PAD
    if window is not None and engine == "vllm":  # v1/core/single_type_kv_cache_manager.py
        held = min(context, window - 1 + chunk)
        return min(-(-held // VLLM_BLOCK) + 1, -(-context // VLLM_BLOCK)) * VLLM_BLOCK
    if window is not None:
        return min(context, window)
    return -(-context // VLLM_BLOCK) * VLLM_BLOCK if engine == "vllm" else context


def sliding_cells(geometry: Geometry, context: int) -> int:
    """Tokens that llama.cpp's cache of a sliding layer has room for, 0 where none slides."""
    windows = [window for window in cached_windows(geometry, "llama.cpp") if window is not None]
    return cells("llama.cpp", context, windows[0]) if windows and geometry.loops == 1 else 0


def check_kv_dtype(geometry: Geometry, engine: str, kv_dtype: str) -> None:
    """Raises QtoolError for a cache type that the engine does not have or the heads do not divide into."""
    if kv_dtype not in KV_OF[engine]:
        raise QtoolError(f"--kv-dtype {kv_dtype}: {engine} keeps its cache in {', '.join(KV_OF[engine])}.")
    block = KV_BLOCK.get(kv_dtype, 1)
    if geometry.head_dim % block:
        raise QtoolError(f"--kv-dtype {kv_dtype}: heads of {geometry.head_dim} do not divide into blocks of {block}.")
