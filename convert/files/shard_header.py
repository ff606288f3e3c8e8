"""The header of a safetensors shard, read without the library: what each tensor is and whether the file can hold it.

Format: https://github.com/huggingface/safetensors#format (u64 little-endian header length, JSON header, data). The
library takes the last of two equal keys and tensors of no size; a source model that holds either is damaged.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.reading import MB, open_file, shown

# bits of each dtype that the format knows, those that qtool does not start from among them
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # one shard, or the list of several
HEADER_LIMIT = 32 * MB  # a tensor takes 130 bytes of it: 250,000 tensors
NAME_LIMIT = 500
_LENGTH = 8
Stored = tuple[str, tuple[int, ...]]  # dtype as the header spells it, shape


class _Broken(Exception):
    """Why a file is no whole shard."""


def read_header(shard: Path) -> dict[str, Stored]:
    """Tensors by name, in the order of their names.

    Raises QtoolError naming the shard, and the tensor where it is one: a missing or special file, a header that is no
    JSON or longer than the file, a name held twice or not printable, a dtype qtool does not read, a shape of no size or
    unlike its bytes, bytes that overlap, leave gaps, or end before or after the file does.
    """
    try:
        with open_file(shard) as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(_LENGTH), "little")
            if size < _LENGTH or length > size - _LENGTH:
                raise _Broken(f"its header takes {length:,} bytes, the whole file has {size:,}")
            if length > HEADER_LIMIT:
                raise _Broken(f"its header takes {length / MB:,.0f} MB; qtool reads at most {HEADER_LIMIT / MB:,.0f}")
            entries = _entries(file.read(length))
        return _tensors(entries, size - _LENGTH - length)
    except _Broken as error:
        said = f"{shown(shard)}: not a whole safetensors file ({error}). Get it again, or make it again."
        raise QtoolError(said) from error


def read_places(shard: Path) -> dict[str, int]:
    """Tensor -> its first byte in a shard that `read_header` has read."""
    with open_file(shard) as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        entries = json.loads(file.read(min(length, HEADER_LIMIT)))
    places: dict[str, int] = {
        name: _LENGTH + length + entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__"
    }
    return places


def _entries(header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _Broken(f"its header is no JSON: {error}") from error
    if not isinstance(entries, dict):
        raise _Broken("its header is no JSON object")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Broken("its __metadata__ holds something other than text")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _Broken(f"its header holds {shown(twice)} twice")
    return found


def _tensors(entries: dict[str, Any], data: int) -> dict[str, Stored]:
    found, places = {}, []
    for name, entry in sorted(entries.items()):
        if not name.isprintable() or not 0 < len(name) <= NAME_LIMIT or "/" in name or "\\" in name:
            raise _Broken(f"{shown(name)!r} is no name of a tensor")
        dtype, shape, (begin, end) = _entry(name, entry)
        if dtype not in BITS:
            raise _Broken(f"{name} is stored as {shown(dtype)!r}, which is no dtype")
        if 0 in shape:
            raise _Broken(
                f"{name} has shape {list(shape)} and holds no number: a placeholder, as a trainer with sharded "
                "parameters (ZeRO-3, FSDP) writes it; gather them before saving"
            )
        needed = math.prod(shape) * BITS[dtype]
        if needed != 8 * (end - begin):
            raise _Broken(f"{name} takes {end - begin:,} bytes, its shape {list(shape)} in {dtype} {needed // 8:,}")
        places.append((begin, end, name))
        found[name] = (dtype, shape)
    _no_gaps(places, data)
    return found


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _Broken(f"{name} lacks a dtype, a shape or data_offsets") from error
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_size(number) for number in (*shape, begin, end)):
        raise _Broken(f"{name} has a shape or data_offsets that are no sizes")
    if not isinstance(dtype, str):
        raise _Broken(f"{name} has no dtype")
    return dtype, tuple(shape), (begin, end)


def _is_size(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63


def _no_gaps(places: list[tuple[int, int, str]], data: int) -> None:
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            raise _Broken(f"{name} {'overlaps the tensor before it' if begin < at else 'lies behind a gap'}")
        at = end
    if at != data:
        raise _Broken(f"its tensors take {at:,} bytes, the file has {data:,} for them")
