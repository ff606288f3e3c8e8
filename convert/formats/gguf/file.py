"""A .gguf file, written in place and read back. Header, keys and tensor table are the `gguf` package's work.

Every shape is known from the plan, so the header is written first and each tensor then at its own offset, in any
order; a journal line follows each fsynced step, so that a killed run continues after the last one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import TensorStream
from qtool.convert.files.durable import naming, say
from qtool.convert.files.writer import StepJournal, journal_key, resume_journal, start_journal
from qtool.convert.formats.gguf.ggml import GgmlBlocks, load_gguf, row_bytes
from qtool.convert.formats.gguf.header import Header, read_header, read_tensor, read_value
from qtool.convert.formats.gguf.names import possible_names, row_order
from qtool.convert.models.shape import Decoder, decoder_of

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""GGUF name -> (ggml type, shape in torch order), in file order."""


class GgufWriter:
    """Writes the tensors of ``layout`` into ``path``; steps already in the journal are kept.

    ``describe(writer)`` adds the keys to a `gguf.GGUFWriter`. ``key`` identifies the work: a file with another key's
    journal, or another header, is started over.
    """

    def __init__(
        self, path: Path, architecture: str, describe: Callable[[Any], None], layout: Layout, key: str
    ) -> None:
        self.path, self._layout = path, layout
        self.steps: list[dict[str, Any]] = []
        self.journal_path = path.with_name(path.name + ".journal.jsonl")
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            header, self._offsets, self._size = _header(path, architecture, describe, layout)
            if not self._resume(header, key):
                self._start(header, key)
            self._file = path.open("r+b")
        self._journal = StepJournal(self.journal_path)

    def write(self, name: str, data: torch.Tensor) -> None:
        """Put one tensor's bytes (uint8, any shape) at its place. Raises ValueError when there are not as many as
        planned."""
        type_name, shape = self._layout[name]
        planned = _nbytes(type_name, shape)
        if data.dtype != torch.uint8 or data.numel() != planned:
            raise ValueError(f"{name}: planned {planned} bytes, got {data.numel()} of {data.dtype}")
        self._file.seek(self._offsets[name])
        with naming(self.path):
            self._file.write(data.contiguous().numpy().data)

    def flush(self) -> None:
        """Let readers of the same file see what was written."""
        with naming(self.path):
            self._file.flush()

    def commit(self, step: dict[str, Any]) -> None:
        """Make everything written so far durable, then note the step in the journal. Raises QtoolError (exit 3)."""
        self.flush()
        with naming(self.path):
            os.fsync(self._file.fileno())
        self._journal.add(step)
        self.steps.append(step)

    def close(self) -> None:
        self.flush()
        self._file.close()
        self._journal.close()

    def release(self) -> None:
        """Close what is open, finished or not; what cannot be written any more was not noted as done."""
        for file in (self._file, self._journal):
            with suppress(OSError):
                file.close()

    def _resume(self, header: bytes, key: str) -> bool:
        if not self.path.exists() or self.path.stat().st_size != self._size:
            return False
        steps = resume_journal(self.journal_path, key)
        if steps is None:
            return False
        with self.path.open("rb") as file:
            if file.read(len(header)) != header:
                return False
        self.steps = steps
        return True

    def _start(self, header: bytes, key: str) -> None:
        if self.journal_path.exists() and journal_key(self.journal_path) is None:
            say(f"{self.journal_path}: damaged; its layers are made again.")
        self.journal_path.unlink(missing_ok=True)  # killed here, no old step must speak of the new, empty file
        try:
            with self.path.open("wb") as file:
                file.write(header)
                os.posix_fallocate(file.fileno(), 0, self._size)  # a full disk shows now
        except OSError as error:
            raise QtoolError(
                f"{self.path}: cannot reserve {self._size / 1e9:.2f} GB: {error.strerror}. Free some space, or set "
                "`output_dir:` to another disk.",
                exit_code=3,
            ) from error
        start_journal(self.journal_path, key)


def _header(
    path: Path, architecture: str, describe: Callable[[Any], None], layout: Layout
) -> tuple[bytes, dict[str, int], int]:
    """(everything before the first tensor, padding included; tensor name -> offset in the file; size of the file)."""
    import numpy

    gguf = load_gguf()
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer)
    for name, (type_name, shape) in layout.items():
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
    for name, (type_name, shape) in layout.items():
        offsets[name] = end
        end += gguf.GGUFWriter.ggml_pad(_nbytes(type_name, shape), alignment)
    return header, offsets, end


def _nbytes(type_name: str, shape: tuple[int, ...]) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows * row_bytes(type_name, shape[-1])


def header_of(path: Path, architecture: str, describe: Callable[[Any], None]) -> bytes:
    """What a file without tensors would be, ``describe``d as `GgufWriter` does; ``path`` is only a name."""
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

    def blocks(self, name: str) -> GgmlBlocks:
        """A tensor as stored, in llama.cpp's row order; vectors become one row."""
        place = self.tensors[name]
        rows = place.shape[0] if len(place.shape) > 1 else 1
        return GgmlBlocks(read_tensor(self.path, place).view(rows, -1), place.type, (rows, place.shape[-1]))

    def hf_names(self) -> dict[str, str]:
        """HF name -> GGUF name of every tensor that the model has."""
        if not self._names:  # a table of hundreds of patterns is behind it
            self._names = {hf: name for hf, name in possible_names(self.config).items() if name in self.tensors}
        return self._names

    def codes(self, linear: str) -> GgmlBlocks:
        """A linear (HF name, without `.weight`) as blocks in the source's row order. Raises QtoolError where it is not
        there."""
        name = self.hf_names().get(f"{linear}.weight")
        if name is None:
            raise QtoolError(f"{self.path}: no tensor for {linear}.")
        blocks = self.blocks(name)
        order = row_order(name, blocks.shape[0], self.decoder)
        if order is None:
            return blocks
        data = torch.empty_like(blocks.data)
        data[order] = blocks.data
        return GgmlBlocks(data, blocks.type, blocks.shape)

    def read(self) -> TensorStream:
        """Every tensor of the model under its Hugging Face name, dequantized to float32."""
        for hf, name in self.hf_names().items():
            values = self.blocks(name).dequantize()
            if offset := self.decoder.family.norm_offset(hf):
                values = values - offset
            order = row_order(name, self.layout[name][1][0], self.decoder)
            values = values.view(self.layout[name][1])
            if order is not None:
                restored = torch.empty_like(values)
                restored[order] = values
                values = restored
            yield hf, values
