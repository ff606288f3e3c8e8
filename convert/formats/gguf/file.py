"""A .gguf file: where its tensors lie, and how it is read. Header, keys and tensor table are the `gguf` package's work.

Every shape is known from the plan, so the header is written first and each tensor then at its own offset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import TensorStream
from qtool.convert.files.durable import naming
from qtool.convert.files.writer import Layout, Place, Spec
from qtool.convert.formats.gguf.ggml import GgmlBlocks, load_gguf, row_bytes
from qtool.convert.formats.gguf.header import Header, read_header, read_tensor, read_value
from qtool.convert.formats.gguf.names import STACKED, model_shape, piece, possible_names, row_order
from qtool.convert.models.expert_names import expert_of
from qtool.convert.models.shape import Decoder, decoder_of

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""GGUF name -> (ggml type, shape in torch order), in file order."""


def gguf_layout(path: Path, architecture: str, describe: Callable[[Any], None], tensors: Tensors) -> Layout:
    """Of the file at ``path`` with the tensors of ``tensors``, each a row of bytes; each expert of a stack has a place
    of its own in it (`names.piece`). ``describe(writer)`` adds the keys to a `gguf.GGUFWriter`."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        header, offsets, size = _header(path, architecture, describe, tensors)
    specs: dict[str, Spec] = {name: (torch.uint8, (_nbytes(*tensor),)) for name, tensor in tensors.items()}
    places = {name: Place(path.name, offset, specs[name]) for name, offset in offsets.items()}
    for name, (kind, shape) in tensors.items():
        for expert in range(shape[0] if name.endswith(STACKED) else 0):
            spec: Spec = (torch.uint8, (_nbytes(kind, shape[1:]),))
            places[piece(name, expert)] = Place(path.name, offsets[name] + expert * spec[1][0], spec)
    return Layout({path.name: header}, {path.name: size}, places, f"{path.name}.journal.jsonl")


def _header(
    path: Path, architecture: str, describe: Callable[[Any], None], tensors: Tensors
) -> tuple[bytes, dict[str, int], int]:
    """(everything before the first tensor, padding included; tensor name -> offset in the file; size of the file)."""
    import numpy

    gguf = load_gguf()
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer)
    for name, (type_name, shape) in tensors.items():
        size = _nbytes(type_name, shape)
        rows = shape[:-1]
        writer.add_tensor_info(
            name, (*rows, row_bytes(type_name, shape[-1])), numpy.dtype("uint8"), size,
            gguf.GGMLQuantizationType[type_name],
        )  # fmt: skip
    scratch = path.with_name(path.name + ".header")
    writer.write_header_to_file(scratch)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = scratch.read_bytes()
    scratch.unlink()
    alignment = writer.data_alignment
    header += bytes(-len(header) % alignment)
    offsets, end = {}, len(header)
    for name, (type_name, shape) in tensors.items():
        offsets[name] = end
        end += gguf.GGUFWriter.ggml_pad(_nbytes(type_name, shape), alignment)
    return header, offsets, end


def header_size(path: Path, architecture: str, describe: Callable[[Any], None], tensors: Tensors) -> int:
    """Bytes before the first tensor, as `gguf_layout` would write them; ``path``: of a scratch file."""
    return len(_header(path, architecture, describe, tensors)[0])


def _nbytes(type_name: str, shape: tuple[int, ...]) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows * row_bytes(type_name, shape[-1])


def header_of(path: Path, architecture: str, describe: Callable[[Any], None]) -> bytes:
    """What a file without tensors would be, ``describe``d as in `gguf_layout`; ``path`` is only a name."""
    return _header(path, architecture, describe, {})[0]


class GgufFile:
    """A .gguf file opened for reading; nothing is loaded before it is asked for."""

    def __init__(self, path: Path, header: Header, config: Mapping[str, Any]) -> None:
        self.path, self.config = path, config
        self._header = header
        self._names: dict[str, str] = {}
        self.tensors = header.tensors
        self.layout = {name: (tensor.type, tensor.shape) for name, tensor in self.tensors.items()}

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any]) -> GgufFile:
        """``config``: config.json of the model, which the rows' order follows. Raises QtoolError for a file that is no
        whole GGUF file."""
        try:
            return cls(path, read_header(path), config)
        except (ValueError, OSError) as error:
            raise QtoolError(f"{path}: not a whole GGUF file ({error}).") from error

    @cached_property
    def decoder(self) -> Decoder:
        """The model by its config.json. Raises QtoolError where that is none of a known family."""
        return decoder_of(self.config)

    @property
    def keys(self) -> list[str]:
        """Names of all keys."""
        return list(self._header.keys)

    def metadata(self, key: str) -> Any:
        """A key's value, None where the file does not have it."""
        return read_value(self.path, self._header, key)

    def blocks(self, name: str, expert: int | None = None, part: tuple[int, int] | None = None) -> GgmlBlocks:
        """A tensor as stored, in llama.cpp's row order; vectors become one row. Of a stack one ``expert``'s matrix, or
        all below each other. ``part``: the first of its rows, and the row behind the last."""
        place = self.tensors[name]
        rows, columns = math.prod(place.shape[:-1]), place.shape[-1]
        width, begin = place.nbytes // rows, 0
        if expert is not None:
            rows //= place.shape[0]
            begin = expert * rows
        first, last = part or (0, rows)
        rows, begin = last - first, begin + first
        place = replace(place, nbytes=rows * width, data_offset=place.data_offset + begin * width)
        return GgmlBlocks(read_tensor(self.path, place).view(rows, -1), place.type, (rows, columns))

    def hf_names(self) -> dict[str, str]:
        """HF name -> GGUF name of every tensor that the model has."""
        if not self._names:  # a table of hundreds of patterns is behind it
            possible = possible_names(self.config)
            self._names = {hf: name for hf, name in possible.items() if self._holds(name, expert_of(hf))}
        return self._names

    def _holds(self, name: str, expert: int | None) -> bool:
        place = self.tensors.get(name)
        return place is not None and (expert is None or (len(place.shape) == 3 and expert < place.shape[0]))

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(int(tensor.nbytes) for tensor in self.tensors.values())

    def linears(self) -> list[str]:
        """Names of the layers' matrices, in file order."""
        held = self.decoder.held()
        return [module for name in self.hf_names() for module, _ in held.get(name, ())]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """HF name -> shape."""
        return {hf: model_shape(name, self.layout[name][1]) for hf, name in self.hf_names().items()}

    def stored(self) -> dict[str, Callable[[], torch.Tensor]]:
        """GGUF name -> what reads the tensor's bytes."""
        return {name: partial(self._bytes, name) for name in self.tensors}

    def _bytes(self, name: str) -> torch.Tensor:
        return self.blocks(name).data

    def codes(self, linear: str) -> GgmlBlocks:
        """A linear (HF name, without `.weight`) as blocks in the source's row order. Raises QtoolError where it is not
        there."""
        name = self.hf_names().get(f"{linear}.weight")
        if name is None:
            raise QtoolError(f"{self.path}: no tensor for {linear}.")
        blocks = self.blocks(name, expert_of(linear))
        order = row_order(name, blocks.shape[0], self.decoder)
        if order is None:
            return blocks
        data = torch.empty_like(blocks.data)
        data[order] = blocks.data
        return GgmlBlocks(data, blocks.type, blocks.shape)

    def read(self, prefix: str = "") -> TensorStream:
        """Every tensor of the model whose Hugging Face name begins with ``prefix``, dequantized to float32."""
        for hf in self.hf_names():
            if hf.startswith(prefix):
                yield hf, self.tensor(hf)

    def tensor(self, hf: str) -> torch.Tensor:
        """One tensor under its Hugging Face name, dequantized to float32."""
        name = self.hf_names()[hf]
        shape = model_shape(name, self.layout[name][1])
        values = self.blocks(name, expert_of(hf)).dequantize().view(shape)
        if offset := self.decoder.family.norm_offset(hf):
            values = values - offset
        order = row_order(name, shape[0], self.decoder)
        if order is None:
            return values
        restored = torch.empty_like(values)
        restored[order] = values
        return restored
