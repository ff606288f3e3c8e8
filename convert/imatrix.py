"""Importance matrices in llama.cpp's files: the mean square of each input channel of each linear.

Format: llama.cpp tools/imatrix (imatrix.gguf: `<name>.in_sum2` and `<name>.counts`) and its older .dat.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from qtool import QtoolError
from qtool.convert.ggml import load_gguf

MAX_ENTRIES = 1 << 20  # of a .dat file: more is no importance matrix


def write_imatrix(path: Path, rows: Mapping[str, torch.Tensor], chunks: int, chunk_size: int, dataset: str) -> None:
    """``rows``: GGUF name of a weight -> mean square float32 ``[in]`` over ``chunks`` windows of ``chunk_size``
    tokens."""
    gguf = load_gguf()
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name, row in rows.items():
        tokens = chunks * chunk_size
        writer.add_tensor(f"{name}.in_sum2", (row.float() * tokens).view(1, -1).numpy())
        writer.add_tensor(f"{name}.counts", torch.tensor([[float(tokens)]]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_imatrix(path: Path) -> dict[str, torch.Tensor]:
    """GGUF name of a weight -> mean square float32 ``[in]``. Raises QtoolError for what is not an importance matrix."""
    try:
        with path.open("rb") as file:
            modern = file.read(4) == b"GGUF"
        rows = _read_gguf(path) if modern else _read_dat(path)
        broken = [name for name, row in rows.items() if not bool((row.isfinite() & (row >= 0)).all())]
        if broken:
            raise ValueError(f"{broken[0]} holds NaN, Inf or negative numbers")
        return rows
    except OSError as error:
        raise QtoolError(f"{path}: {error.strerror}.") from error
    except (ValueError, IndexError, KeyError, RuntimeError, OverflowError, struct.error) as error:
        raise QtoolError(f"{path}: not an importance matrix that llama-imatrix wrote ({error}).") from error


def _read_gguf(path: Path) -> dict[str, torch.Tensor]:
    tensors = {t.name: torch.from_numpy(t.data.copy()).float() for t in load_gguf().GGUFReader(path).tensors}
    sums = {name.removesuffix(".in_sum2"): value for name, value in tensors.items() if name.endswith(".in_sum2")}
    if not sums:
        raise ValueError("no tensor ends with .in_sum2")
    rows = {}
    for name, value in sums.items():
        count = tensors[f"{name}.counts"].view(-1, 1)
        mean = value.view(count.shape[0], -1) / count.clamp_min(1)
        rows[name] = torch.where(count > 0, mean, torch.ones_like(mean)).flatten()  # a channel nobody saw counts 1
    return rows


def _read_dat(path: Path) -> dict[str, torch.Tensor]:
    data = path.read_bytes()
    (entries,), at = struct.unpack_from("<i", data), 4
    if not 0 < entries < MAX_ENTRIES:
        raise ValueError(f"{entries} entries")
    rows = {}
    for _ in range(entries):
        (length,) = struct.unpack_from("<i", data, at)
        if not 0 < length < 1024:
            raise ValueError(f"a name of {length} bytes")
        name = data[at + 4 : at + 4 + length].decode()
        calls, values = struct.unpack_from("<ii", data, at + 4 + length)
        at += 12 + length
        if values < 1 or at + 4 * values > len(data):
            raise ValueError(f"{name} has {values} values")
        row = torch.frombuffer(bytearray(data[at : at + 4 * values]), dtype=torch.float32)
        rows[name] = row / max(calls, 1)
        at += 4 * values
    return rows
