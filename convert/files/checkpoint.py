"""A folder of safetensors shards, opened without reading a weight; tensors are then read one by one.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qtool import QtoolError
from qtool.convert.files.diagnosis import UNQUANTIZED, why_missing, why_no_model
from qtool.convert.files.reading import open_file, read_json, refuse_link, shown
from qtool.convert.files.shard_header import INDEX, SINGLE, read_header, read_places
from qtool.convert.files.tensor_info import TensorInfo

TensorStream = Iterator[tuple[str, torch.Tensor]]
MOST_AT_ONCE = 1 << 30  # Linux reads at most 2 GiB in one call
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
# Rotary tables that old checkpoints carry and every loader computes anew: not part of the model.
COMPUTED = ".rotary_emb.inv_freq"
# Weights that lie beside a model's own: an adapter's, a trainer's, Mistral's second copy under names of its own.
NOT_THE_MODEL = ("adapter", "optimizer", "scheduler", "training_args", "rng_state", "consolidated")
SOURCES = (torch.float16, torch.bfloat16, torch.float32)
_NUMBERED = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Shard:
    """An open shard: its descriptor, closed when nobody reads any more, and where each tensor begins."""

    def __init__(self, path: Path) -> None:
        with open_file(path) as file:
            self.places = read_places(path)
            self.descriptor = os.dup(file.fileno())
        # not by __del__: at the interpreter's end `os` may be gone before the last reader is
        weakref.finalize(self, os.close, self.descriptor)


class Checkpoint:
    """Names, dtypes and shapes of every tensor in a folder; `tensor()` reads one."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.tensors = tensors
        self._open: dict[Path, _Shard] = {}

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read and validate every shard's header.

        Raises QtoolError naming the file: no safetensors (pickle-only folders get the command that converts them),
        a shard that is missing, truncated or outside the folder, a tensor that two shards hold, or that the index
        promises and none holds.
        """
        if not path.is_dir():
            raise QtoolError(f"{path}: no such folder.")
        shards = _shards(path)
        promised: dict[str, str] = {}
        if path / SINGLE not in shards and os.path.lexists(path / INDEX):
            promised = _read_index(path)
            shards = [path / name for name in sorted(set(promised.values()))]
        if not shards:
            raise QtoolError(why_no_model(path))
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            found = _read_header(path, shard)
            twice = sorted((set(found) & set(tensors)) - set(promised))
            if twice:
                raise QtoolError(
                    f"{shard}: holds {twice[0]} ({len(twice)} such), which {tensors[twice[0]].file.name} holds too. "
                    "Which one is the model's cannot be told: remove the other file, or give the folder its index."
                )
            tensors |= {n: info for n, info in found.items() if n not in tensors or promised[n] == shard.name}
        wrong = [name for name, shard in promised.items() if name not in tensors or tensors[name].file.name != shard]
        if wrong:
            holder = tensors[wrong[0]].file.name if wrong[0] in tensors else "no shard"
            raise QtoolError(
                f"{path / INDEX}: says that {promised[wrong[0]]} holds {shown(wrong[0])} ({len(wrong)} such); {holder} "
                "does. Index and shards are not of one model: download it again."
            )
        return cls(path, {name: info for name, info in tensors.items() if not name.endswith(COMPUTED)})

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the dtype it was stored in. Raises QtoolError where there is none, or its shard has
        become shorter: read, not mapped, for a mapped file that shrinks ends the process."""
        return self.part(name, 0, None)

    def part(self, name: str, first: int, last: int | None) -> torch.Tensor:
        """The same for rows ``first`` to ``last`` (None: the end; not included) of a tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise QtoolError(f"{self.path}: no tensor {name}.")
        if (small := info.small) is not None:
            scales = self._part(name, small.scales, 0, None)
            return small.decode(self._part(name, small.codes, first, last), scales, first, info.dtype)
        return self._part(name, info, first, last)

    def _part(self, name: str, info: TensorInfo, first: int, last: int | None) -> torch.Tensor:
        """As it is stored."""
        opened = self._open.get(info.file)
        if opened is None:
            try:
                opened = _Shard(info.file)
            except (ValueError, LookupError, TypeError) as error:
                raise _shrunk(info.file, name) from error
            self._open = {info.file: opened}  # one shard open at a time
        rows = info.shape[0] if info.shape else 1
        last = rows if last is None else min(last, rows)
        held = info.within
        if held is None or held.index is None:
            return _rows(opened, held.name if held else name, info, first, last)
        count, height, width = held.shape
        flat, start = replace(info, shape=(count * height, width)), held.index * height
        first, last = held.first + first, held.first + last
        if held.transposed:
            return _rows(opened, held.name, flat, start, start + height)[:, first:last].t().contiguous()
        return _rows(opened, held.name, flat, start + first, start + last)

    def holding(self, tensors: Mapping[str, TensorInfo]) -> Checkpoint:
        """The same folder, its tensors under other names or as parts of what is stored."""
        return Checkpoint(self.path, tensors)

    def without(self, names: Iterable[str]) -> Checkpoint:
        """The same folder, some of its tensors left out."""
        gone = set(names)
        return Checkpoint(self.path, {name: info for name, info in self.tensors.items() if name not in gone})

    def read(self, names: Iterable[str] | None = None) -> TensorStream:
        """Every tensor (or those named), shard by shard."""
        for name in names if names is not None else self.tensors:
            yield name, self.tensor(name)

    def refuse_strangers(self, names: Sequence[str]) -> None:
        """Raises QtoolError where there are any: the walk would leave them unwritten, and no loader has a place for
        them."""
        if names:
            raise QtoolError(
                f"{self.tensors[names[0]].file}: holds {names[0]} ({len(names)} such), which config.json does not "
                "imply. Weights and config.json are not of one model."
            )

    def check_dtypes(self) -> None:
        """Raises QtoolError for a tensor that is no 16- or 32-bit float, whatever config.json says."""
        for name, info in self.tensors.items():
            if info.dtype not in SOURCES:
                raise QtoolError(
                    f"{info.file}: {name} is stored as {DTYPE_NAMES[info.dtype]}; qtool starts from FP16, BF16 or FP32 "
                    + ("weights: save it as FP32." if info.dtype == torch.float64 else f"weights. {UNQUANTIZED}.")
                )

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]], tied: Iterable[str] = ()) -> None:
        """Compare with what config.json implies. Raises QtoolError naming the tensor, its shard and both shapes."""
        for name, shape in expected.items():
            info = self.tensors.get(name)
            if info is None:
                if name in set(tied):
                    continue
                raise QtoolError(why_missing(self.path, name, self.tensors))
            if info.shape != shape:
                raise QtoolError(
                    f"{info.file}: {name} has shape {list(info.shape)}, but config.json implies {list(shape)}. "
                    "Weights and config.json are not of one model."
                )


def _rows(shard: _Shard, name: str, info: TensorInfo, first: int, last: int) -> torch.Tensor:
    """Rows ``first`` to ``last`` of a stored tensor of ``info``'s shape."""
    rows = info.shape[0] if info.shape else 1
    row = info.nbytes // max(rows, 1)
    data = torch.empty((last - first) * row, dtype=torch.uint8)
    if name not in shard.places:
        raise _shrunk(info.file, name)
    _fill(data, shard.descriptor, shard.places[name] + first * row, info.file, name)
    return data.view(info.dtype).view((last - first, *info.shape[1:]) if info.shape else ())


def _fill(data: torch.Tensor, descriptor: int, at: int, shard: Path, name: str) -> None:
    """Read as many bytes as ``data`` has, from ``at`` on."""
    rest = data.numpy().data
    while len(rest):
        try:
            count = os.preadv(descriptor, [rest[:MOST_AT_ONCE]], at)
        except OSError as error:
            raise QtoolError(f"{shard}: {name} cannot be read ({error.strerror}).", exit_code=3) from error
        if count == 0:
            raise _shrunk(shard, name)
        rest, at = rest[count:], at + count


def _shrunk(shard: Path, name: str) -> QtoolError:
    return QtoolError(f"{shard}: became shorter or another file while it was read: {name} is not whole. Run again.")


def _shards(folder: Path) -> list[Path]:
    """What transformers and vLLM take for the model's where there is no index. One file named model.safetensors is the
    model; else numbered shards are; else what is left without the files of trainers and adapters."""
    found = sorted(folder.glob("*.safetensors"))
    if folder / SINGLE in found:  # as transformers does: nothing beside it is looked at
        return [folder / SINGLE]
    numbered = [shard for shard in found if _NUMBERED.fullmatch(shard.name)]
    return numbered or [shard for shard in found if not shard.name.startswith(NOT_THE_MODEL)]


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor -> shard, a file beside the index. Raises QtoolError for what is no such map."""
    path = folder / INDEX
    refuse_link(folder, path)
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise QtoolError(f"{path}: has no weight_map, which says in which shard each tensor is.")
    for name, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            shard = shown(shard) if isinstance(shard, str) else shard
            raise QtoolError(f"{path}: says that {shown(name)} is in {shard!r}, which is no file of this folder.")
    return shards


def _read_header(folder: Path, shard: Path) -> dict[str, TensorInfo]:
    if not os.path.lexists(shard):
        raise QtoolError(f"{shown(shard)}: the shard is missing. Download the model again.")
    refuse_link(folder, shard)
    infos = {}
    for name, (dtype, shape) in read_header(shard).items():
        if dtype not in DTYPES:
            raise QtoolError(
                f"{shard}: {name} is stored as {dtype}; qtool starts from FP16, BF16 or FP32 weights. {UNQUANTIZED}."
            )
        infos[name] = TensorInfo(shard, DTYPES[dtype], shape)
    return infos
