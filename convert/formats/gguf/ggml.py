"""ggml's tensor types, and a matrix stored in one of them.

Block layouts: ggml/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.formats.gguf import ggml_fields

INSTALL = "pip install 'qtool-llm[gguf]'"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# type -> (elements to a block, bytes of a block); llama.cpp/ggml/src/ggml-common.h
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20),
    "Q5_0": (32, 22), "Q5_1": (32, 24), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip


def load_gguf() -> Any:
    """The `gguf` package. Raises QtoolError (exit 3) with the command that installs it."""
    try:
        import gguf
    except ImportError as error:
        raise QtoolError(f"GGUF files need the gguf package, which is not installed here. Run: {INSTALL}", 3) from error
    return gguf


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of integers are equal: bytes eight at a time, which takes a fifth of the time."""
    if a.dtype == b.dtype == torch.uint8 and a.shape == b.shape and a.numel() % 8 == 0:
        a, b = (t.contiguous().view(-1) for t in (a, b))
        if all(t.storage_offset() % 8 == 0 for t in (a, b)):
            return torch.equal(a.view(torch.int64), b.view(torch.int64))
    return torch.equal(a, b)


def row_bytes(type_name: str, columns: int) -> int:
    """Bytes of one row. Raises ValueError where a block would straddle two rows."""
    elements, size = BLOCKS[type_name]
    if columns % elements:
        raise ValueError(f"{columns} columns do not divide into {type_name} blocks of {elements}")
    return columns // elements * size


@dataclass(frozen=True)
class GgmlBlocks:
    """A matrix ``[out, in]`` in blocks of consecutive weights of a row: data uint8 ``[out, bytes of a row]``."""

    data: torch.Tensor
    type: str
    shape: tuple[int, int]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Weight ``[out, in]`` as llama.cpp reads it, on the device of ``data``."""
        if self.type in FLOATS:
            return self.data.contiguous().view(FLOATS[self.type]).to(dtype, copy=True)
        if self.type in ggml_fields.TYPES:
            return ggml_fields.dequantize(self.fields()).view(self.shape).to(dtype)
        gguf = load_gguf()  # types that qtool reads and never writes
        values = gguf.quants.dequantize(self.data.cpu().numpy(), gguf.GGMLQuantizationType[self.type])
        return torch.from_numpy(values).view(self.shape).to(self.data.device, dtype)

    def fields(self) -> ggml_fields.Fields:
        """The numbers in the blocks, row by row; of the types that qtool writes."""
        return ggml_fields.unpack(self.data.reshape(-1, BLOCKS[self.type][1]), self.type)

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.data.device

    def to(self, device: torch.device) -> GgmlBlocks:
        """The same blocks on ``device``."""
        return GgmlBlocks(self.data.to(device), self.type, self.shape)

    def pieces(self, weights: int) -> Iterator[GgmlBlocks]:
        """Its rows, as many at a time as hold ``weights`` weights."""
        rows, columns = self.shape
        step = max(1, weights // columns)
        for first in range(0, rows, step):
            data = self.data[first : first + step]
            yield GgmlBlocks(data, self.type, (data.shape[0], columns))

    def equals(self, other: object) -> bool:
        """Bit for bit."""
        return (
            isinstance(other, GgmlBlocks)
            and (self.type, self.shape) == (other.type, other.shape)
            and same_bits(self.data, other.data)
        )
