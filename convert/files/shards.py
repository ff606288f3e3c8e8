"""Where each tensor lies in safetensors files, from shapes alone.

Format: https://github.com/huggingface/safetensors#format (u64 little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qtool.convert.files.checkpoint import DTYPE_NAMES
from qtool.convert.files.shard_header import INDEX
from qtool.convert.files.writer import Layout, Place, Spec, TensorWriter, nbytes

MAX_SHARD_BYTES = 5_000_000_000


def open_shards(
    folder: Path, specs: Mapping[str, Spec], key: str, stem: str = "model", max_shard: int = MAX_SHARD_BYTES
) -> TensorWriter:
    """Files that will hold the tensors of ``specs``, in that order; begun work of the same ``key`` goes on."""
    return TensorWriter(folder, shard_layout(specs, stem, max_shard), key)


def shard_layout(specs: Mapping[str, Spec], stem: str = "model", max_shard: int = MAX_SHARD_BYTES) -> Layout:
    """Several files get an index beside them, which loaders follow."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, spec in specs.items():
        size = nbytes(spec)
        if shards[-1] and used + size > max_shard:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    places: dict[str, Place] = {}
    for number, names in enumerate(shards, 1):
        shard = f"{stem}.safetensors"
        if len(shards) > 1:
            shard = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offsets, end = _header(names, specs)
        headers[shard], sizes[shard] = header, len(header) + end
        places |= {name: Place(shard, len(header) + offset, specs[name]) for name, offset in offsets.items()}
    closing = {INDEX: _index(places)} if len(shards) > 1 else {}
    return Layout(headers, sizes, places, f"{stem}.journal.jsonl", closing)


def file_sizes(specs: Mapping[str, Spec], stem: str = "model", max_shard: int = MAX_SHARD_BYTES) -> dict[str, int]:
    """Shard -> bytes that it will have on the disk, header included."""
    return shard_layout(specs, stem, max_shard).sizes


def _index(places: Mapping[str, Place]) -> str:
    total = sum(nbytes(place.spec) for place in places.values())
    weight_map = {name: place.file for name, place in sorted(places.items())}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def _header(names: Iterable[str], specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int], int]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    # larger elements first keeps every tensor aligned to its own size, as safetensors' own writer does
    for name in sorted(names, key=lambda n: (-specs[n][0].itemsize, n)):
        dtype, shape = specs[name]
        offsets[name] = end
        end += nbytes(specs[name])
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body, offsets, end
