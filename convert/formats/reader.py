"""What reads an artifact's weights, however they lie: the same questions of safetensors files and of a .gguf file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

from qtool.convert.files.checkpoint import Checkpoint, TensorStream
from qtool.convert.formats.codes import Codes
from qtool.convert.formats.linears import Linears
from qtool.convert.models.feeds import Shape


class Reader(Protocol):
    """Weights on disk, under the names that they have in the source."""

    @property
    def nbytes(self) -> int:
        """Of all tensors."""

    def linears(self) -> list[str]:
        """Names of the quantized matrices, in file order."""

    def codes(self, linear: str) -> Codes:
        """One of them as codes and scales. Raises QtoolError where it is not there or does not fit together."""

    def shapes(self) -> dict[str, Shape]:
        """Name -> shape of every tensor of the model, a quantized matrix's as its weight."""

    def read(self, prefix: str = "") -> TensorStream:
        """Every tensor of the model whose name begins with ``prefix``, quantized ones dequantized to float32."""

    def stored(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Name in the file -> what reads that tensor as it is stored."""


class Folder:
    """Safetensors files; ``section``: quantization_config, empty for a model that is not quantized."""

    def __init__(self, checkpoint: Checkpoint, section: Mapping[str, Any]) -> None:
        self.checkpoint, self.section = checkpoint, section

    @property
    def packed(self) -> Linears:
        """Raises QtoolError, once it is asked, for a container that qtool does not read."""
        return Linears(self.checkpoint, self.section)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(info.nbytes for info in self.checkpoint.tensors.values())

    def linears(self) -> list[str]:
        """In file order."""
        return self.packed.names() if self.section else []

    def codes(self, linear: str) -> Codes:
        """As the container unpacks it."""
        return self.packed.codes(linear)

    def shapes(self) -> dict[str, Shape]:
        """Those of the matrices last. Raises QtoolError for a model that is not quantized."""
        packed, tensors = self.packed, self.checkpoint.tensors
        linears = packed.names()
        parts = {f"{linear}.{suffix}" for linear in linears for suffix in packed.parts(linear)}
        shapes = {name: info.shape for name, info in tensors.items() if name not in parts}
        return shapes | {f"{linear}.weight": packed.shape(linear) for linear in linears}

    def read(self, prefix: str = "") -> TensorStream:
        """In file order."""
        wanted = [name for name in self.checkpoint.tensors if name.startswith(prefix)]
        if not self.section:
            yield from self.checkpoint.read(wanted)
            return
        packed = self.packed
        mark = f".{packed.container.MARK}"
        parts = {f"{linear}.{suffix}" for linear in packed.names() for suffix in packed.parts(linear)}
        for name in wanted:
            if name.endswith(mark):
                linear = name.removesuffix(mark)
                yield f"{linear}.weight", packed.codes(linear).dequantize()
            elif name not in parts:
                yield name, self.checkpoint.tensor(name)

    def stored(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Every tensor."""
        return {name: partial(self.checkpoint.tensor, name) for name in self.checkpoint.tensors}
