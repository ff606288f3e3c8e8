"""A folder of safetensors shards, opened without reading a weight; tensors are then read one by one.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qtool import QtoolError
from qtool.convert.reading import read_json

TensorStream = Iterator[tuple[str, torch.Tensor]]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
# Rotary tables that old checkpoints carry and every loader computes anew: not part of the model.
COMPUTED = ".rotary_emb.inv_freq"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


class Checkpoint:
    """Names, dtypes and shapes of every tensor in a folder; `tensor()` reads one."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.tensors = tensors
        self._open: dict[Path, Any] = {}

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read and validate every shard's header.

        Raises QtoolError naming the file: no safetensors (pickle-only folders get the command that converts them),
        a shard that is missing, truncated or outside the folder, a tensor that two shards hold, or that the index
        promises and none holds.
        """
        if not path.is_dir():
            raise QtoolError(f"{path}: no such folder.")
        shards = sorted(path.glob("*.safetensors"))
        promised: dict[str, str] = {}
        if path / SINGLE in shards:  # as transformers does: nothing beside it is looked at
            shards = [path / SINGLE]
        elif (path / INDEX).exists():
            promised = _read_index(path / INDEX)
            shards = [path / name for name in sorted(set(promised.values()))]
        if not shards:
            raise QtoolError(_no_safetensors(path))
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            found = _read_header(shard)
            twice = sorted((set(found) & set(tensors)) - set(promised))
            if twice:
                raise QtoolError(
                    f"{shard}: holds {twice[0]} ({len(twice)} such), which {tensors[twice[0]].file.name} holds too. "
                    "Which one is the model's cannot be told: remove the other file, or give the folder its index."
                )
            tensors |= {n: info for n, info in found.items() if n not in tensors or promised[n] == shard.name}
        missing = sorted(set(promised) - set(tensors))
        if missing:
            raise QtoolError(f"{path / INDEX}: lists {missing[0]} ({len(missing)} such), which no shard holds.")
        return cls(path, {name: info for name, info in tensors.items() if not name.endswith(COMPUTED)})

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the dtype it was stored in."""
        info = self.tensors.get(name)
        if info is None:
            raise QtoolError(f"{self.path}: no tensor {name}.")
        if info.file not in self._open:
            self._open = {info.file: safe_open(info.file, framework="pt")}  # one shard mapped at a time
        tensor: torch.Tensor = self._open[info.file].get_tensor(name)
        return tensor

    def read(self, names: Iterable[str] | None = None) -> TensorStream:
        """Every tensor (or those named), shard by shard."""
        for name in names if names is not None else self.tensors:
            yield name, self.tensor(name)

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]], tied: Iterable[str] = ()) -> None:
        """Compare with what config.json implies. Raises QtoolError naming the tensor, its shard and both shapes."""
        for name, shape in expected.items():
            info = self.tensors.get(name)
            if info is None:
                if name in set(tied):
                    continue
                raise QtoolError(
                    f"{self.path}: config.json implies a tensor {name} {list(shape)}, which no shard holds."
                )
            if info.shape != shape:
                raise QtoolError(
                    f"{info.file}: {name} has shape {list(info.shape)}, but config.json implies {list(shape)}. "
                    "Weights and config.json are not of one model."
                )


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> shard, a file beside the index. Raises QtoolError for what is no such map."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise QtoolError(f"{path}: has no weight_map, which says in which shard each tensor is.")
    for name, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise QtoolError(f"{path}: says that {name} is in {shard!r}, which is no file of this folder.")
    return shards


def _read_header(shard: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(shard, framework="pt") as file:
            infos = {}
            for name in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                view = file.get_slice(name)
                dtype = DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise QtoolError(
                        f"{shard}: {name} is stored as {view.get_dtype()}; qtool starts from FP16, BF16 or FP32 "
                        "weights. Take the unquantized release of this model."
                    )
                infos[name] = TensorInfo(shard, dtype, tuple(view.get_shape()))
            return infos
    except FileNotFoundError as error:
        raise QtoolError(f"{shard}: the shard is missing. Download the model again.") from error
    except SafetensorError as error:
        raise QtoolError(f"{shard}: not a whole safetensors file ({error}). Download the shard again.") from error


def _no_safetensors(path: Path) -> str:
    pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickles:
        return (
            f"{path}: holds only pickle weights ({pickles[0].name}), which can run code when opened, so qtool refuses "
            'them. Convert where you trust the file: `python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path.name}', torch_dtype='auto').save_pretrained('{path.name}-safetensors')\"`"
        )
    return f"{path}: no *.safetensors in this folder. Name a folder that holds a Hugging Face model."
