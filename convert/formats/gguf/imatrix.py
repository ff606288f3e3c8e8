"""Importance matrices in llama.cpp's files: the mean square of each input channel of each linear.

Format: llama.cpp tools/imatrix (imatrix.gguf: `<name>.in_sum2` and `<name>.counts`) and its older .dat.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from qtool import QtoolError
from qtool.convert.files.reading import MB, open_file, read_bytes
from qtool.convert.formats.gguf.ggml import load_gguf
from qtool.convert.formats.gguf.header import read_header, read_tensor

SIZE_LIMIT = 4096 * MB  # a model of 10**6 matrices of 1,000 columns; the largest real ones have a tenth
METADATA_LIMIT, ITEMS_LIMIT = 64 * MB, 100_000  # a tensor's place takes 100 bytes; the only list names text files
MAX_ENTRIES = 1 << 20  # of a .dat file: more is no importance matrix
IMATRIX = "imatrix.gguf"  # beside the file that it weighed
SUMS, COUNTS = ".in_sum2", ".counts"


def write_imatrix(
    path: Path, rows: Mapping[str, torch.Tensor], chunks: int, chunk_size: int, dataset: str,
    tokens: Mapping[str, Sequence[float]] | None = None,
) -> None:  # fmt: skip
    """``rows``: GGUF name of a weight -> mean square float32 ``[in]``, of a stack of experts ``[experts, in]``, over
    ``chunks`` windows of ``chunk_size`` tokens. ``tokens``: the same name -> how many of them each row saw, where that
    was not all. A row of zeros, whose inputs never were anything else, is written as never seen; a row that saw no
    token and was given the numbers of others, as one that saw one."""
    gguf = load_gguf()
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name, row in rows.items():
        means = row.float().view(-1, row.shape[-1])
        seen = torch.tensor((tokens or {}).get(name, [chunks * chunk_size] * len(means)), dtype=torch.float32)
        counts = torch.where(means.any(1), seen.clamp_min(1), 0).unsqueeze(1)
        writer.add_tensor(f"{name}{SUMS}", (means * counts).numpy())
        writer.add_tensor(f"{name}{COUNTS}", counts.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_imatrix(path: Path) -> dict[str, torch.Tensor]:
    """GGUF name of a weight -> mean square float32 ``[in]`` (of a stack of experts: one row after the other).

    Raises QtoolError for what is not an importance matrix, and for one whose rows are not all mean squares: a matrix
    of zeros would let every error of its weights pass."""
    try:
        with open_file(path, SIZE_LIMIT) as file:
            modern = file.read(4) == b"GGUF"
        return _read_gguf(path) if modern else _read_dat(read_bytes(path, SIZE_LIMIT))
    except OSError as error:
        raise QtoolError(f"{path}: {error.strerror}.") from error
    except (ValueError, IndexError, KeyError, TypeError, RuntimeError, OverflowError, struct.error) as error:
        raise QtoolError(f"{path}: not an importance matrix that llama-imatrix wrote ({error}).") from error


def _read_gguf(path: Path) -> dict[str, torch.Tensor]:
    tensors = read_header(path, METADATA_LIMIT, ITEMS_LIMIT).tensors
    odd = [name for name, tensor in tensors.items() if name.endswith((SUMS, COUNTS)) and tensor.type != "F32"]
    if odd:
        raise ValueError(f"{odd[0]} is {tensors[odd[0]].type}, not F32")
    ends = {end: {name.removesuffix(end) for name in tensors if name.endswith(end)} for end in (SUMS, COUNTS)}
    if not ends[SUMS]:
        raise ValueError(f"no tensor ends with {SUMS}")
    if alone := sorted(ends[SUMS] ^ ends[COUNTS]):
        raise ValueError(f"{alone[0]} has {SUMS} or {COUNTS} alone")
    rows = {}
    for name in sorted(ends[SUMS]):
        count = read_tensor(path, tensors[f"{name}{COUNTS}"]).view(torch.float32).view(-1, 1)
        sums = read_tensor(path, tensors[f"{name}{SUMS}"]).view(torch.float32)
        if sums.numel() % count.numel():
            raise ValueError(f"{name} has {sums.numel()} sums for {count.numel()} counts")
        rows[name] = _means(name, sums.view(count.shape[0], -1), count)
    return rows


def _means(name: str, sums: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """``sums [n, in]``, ``count [n, 1]`` -> mean squares ``[n * in]``. A matrix that nobody saw (count 0) weighs every
    channel alike, as llama.cpp does."""
    for numbers in (sums, count):
        if not bool((numbers.isfinite() & (numbers >= 0)).all()):
            raise ValueError(f"{name} holds NaN, Inf or negative numbers")
    seen, live = count[:, 0] > 0, (sums > 0).any(1)
    for number in (seen != live).nonzero().flatten().tolist():
        of = f" (matrix {number} of {len(count)})" if len(count) > 1 else ""
        if live[number]:
            raise ValueError(f"{name}{of} holds sums of 0 tokens")
        raise ValueError(
            f"{name}{of} holds only zeros: its inputs never were anything else where llama-imatrix looked. Make the "
            "matrix anew, or leave this tensor out of it"
        )
    mean = torch.where(count > 0, sums / count.clamp_min(1e-30), torch.ones_like(sums))
    if not bool(mean.isfinite().all()):
        raise ValueError(f"{name} holds sums too large for its count")
    return mean.flatten()


def _read_dat(data: bytes) -> dict[str, torch.Tensor]:
    (entries,), at = struct.unpack_from("<i", data), 4
    if not 0 < entries < MAX_ENTRIES:
        raise ValueError(f"{entries} entries")
    rows: dict[str, torch.Tensor] = {}
    for _ in range(entries):
        (length,) = struct.unpack_from("<i", data, at)
        if not 0 < length < 1024:
            raise ValueError(f"a name of {length} bytes")
        name = data[at + 4 : at + 4 + length].decode()
        calls, values = struct.unpack_from("<ii", data, at + 4 + length)
        at += 12 + length
        if values < 1 or at + 4 * values > len(data):
            raise ValueError(f"{name} has {values} values")
        if name in rows:
            raise ValueError(f"two entries {name}")
        sums = torch.frombuffer(bytearray(data[at : at + 4 * values]), dtype=torch.float32)
        rows[name] = _means(name, sums.view(1, -1), torch.tensor([[float(calls)]]))
        at += 4 * values
    return rows
