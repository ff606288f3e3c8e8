"""Weights into llama.cpp's blocks, equal to llama-quantize's bit for bit.

On the CPU ggml's own C code makes them, on all cores; on an accelerator kquants.py and low_bits.py.

The C code is found in a prebuilt wheel: xllamacpp (which can also run the file) or libggml-python.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool import QtoolError
from qtool.convert.formats.gguf.ggml import FLOATS, INSTALL, GgmlBlocks, load_gguf, row_bytes
from qtool.quantize.methods import kquant_candidates, kquants, low_bits

PACKAGES = {"xllamacpp": "xllamacpp", "libggml": "libggml-python"}  # module -> distribution, the first found is used
CHUNK_WEIGHTS = 1 << 20  # a core's share at a time: float32 copies stay in its cache's neighbourhood
TINY = 1e-12  # its square times a weight's is still a normal float32


def quantize_ggml(weight: Tensor, type_name: str, importance: Tensor | None = None) -> GgmlBlocks:
    """``weight [out, in]`` of any float dtype -> its blocks. ``importance``: float32 ``[in]``, what a squared error in
    each column counts (None: every type's own rule). The result is on the weight's device.

    On an accelerator the types of kquants.TYPES are made there, those of low_bits.TYPES where importance is known,
    others by the same library, through host memory.
    Raises QtoolError (exit 3) where the library is needed and no ggml library is installed.
    """
    out, columns = weight.shape
    if type_name in FLOATS:
        data = weight.to(FLOATS[type_name]).contiguous().view(torch.uint8)
        return GgmlBlocks(data, type_name, (out, columns))
    if weight.is_cuda and type_name in kquants.TYPES:
        return kquants.quantize(weight, type_name, importance)
    if weight.is_cuda and type_name in low_bits.TYPES and importance is not None:
        return low_bits.quantize(weight, type_name, importance)
    library = load_library()
    kind = int(load_gguf().GGMLQuantizationType[type_name])
    library.ggml_quantize_init(kind)
    row = None if importance is None else importance.float().cpu().contiguous()
    data = torch.empty(out, row_bytes(type_name, columns), dtype=torch.uint8)

    def quantize(start: int, stop: int) -> None:
        source = weight[start:stop].float().cpu().contiguous()
        library.ggml_quantize_chunk(
            kind, source.data_ptr(), data[start:stop].data_ptr(), 0, stop - start, columns,
            None if row is None else row.data_ptr(),
        )  # fmt: skip

    cores = os.cpu_count() or 1
    step = max(1, min(CHUNK_WEIGHTS // columns, -(-out // cores)))
    bounds = [(start, min(start + step, out)) for start in range(0, out, step)]
    with ThreadPoolExecutor(max_workers=cores) as pool:
        for done in [pool.submit(quantize, *pair) for pair in bounds]:
            done.result()
    return GgmlBlocks(data.to(weight.device), type_name, (out, columns))


def fits(weight: Tensor, type_name: str) -> bool:
    """Whether every value lies within what the type holds; the blocks' scales are float16."""
    limit = torch.finfo(torch.bfloat16).max if type_name in ("BF16", "F32") else kquant_candidates.HALF_MAX
    return float(weight.abs().max()) <= limit


@cache
def load_library() -> Any:
    """ggml's shared library. Raises QtoolError (exit 3) with the command that installs it."""
    for path in _candidates():
        try:
            library = ctypes.CDLL(str(path))
            library.ggml_quantize_init.argtypes = [ctypes.c_int]
            library.ggml_quantize_chunk.argtypes = [
                ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
                ctypes.c_void_p,
            ]  # fmt: skip
            library.ggml_quantize_chunk.restype = ctypes.c_size_t
        except (OSError, AttributeError):
            continue
        return library
    raise QtoolError(f"GGUF's block types need ggml's quantizer, which is not installed here. Run: {INSTALL}", 3)


def quantizer_package() -> tuple[str, ...]:
    """The distribution whose C code makes the blocks; empty where none is installed."""
    installed = [name for module, name in PACKAGES.items() if find_spec(module)]
    return tuple(installed[:1])


def _candidates() -> Iterator[Path]:
    for package, pattern in zip(PACKAGES, ("xllamacpp*.so", "**/libggml-base.so"), strict=True):
        spec = find_spec(package)
        for folder in spec.submodule_search_locations or [] if spec else []:
            yield from Path(folder).glob(pattern)


def live(row: Tensor) -> Tensor:
    """``row [in]``, mean squares, without zeros: channels that no text moved count as the least that any channel
    counted; where a matrix saw nothing at all, all count alike.

    Where the weights that share a scale all count 0, or so little or much that the products leave float32, ggml finds
    no scale and writes zeros for them.
    """
    row = row.float()
    top = float(row.max())
    if top == 0:
        return torch.ones_like(row)
    if not TINY < top < 1 / TINY:
        row = row / top
    return row.clamp_min(float(row[row >= TINY].min()))
