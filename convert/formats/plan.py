"""What an output will be, tensor by tensor, from shapes alone: names, dtypes, bytes, bits per weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qtool.convert.files.tensor_info import TensorInfo
from qtool.convert.files.writer import Spec
from qtool.convert.models.shape import Decoder

QUANTIZED_SHARE = 0.99  # of the weights that are to be quantized


@dataclass(frozen=True)
class ModelShape:
    """What a plan is made from: the source's tensors, what its family says of them, and its config.json."""

    tensors: Mapping[str, TensorInfo]
    decoder: Decoder
    config: Mapping[str, Any]


@dataclass(frozen=True)
class LinearPlan:
    """One linear of the layers: shape ``[out, in]``, its group size, the bytes it will take, bits of a code (0 where a
    type says all) and, where a file has many types, its type."""

    name: str
    out: int
    columns: int
    group_size: int
    nbytes: int
    type: str = ""
    bits: int = 0


@dataclass(frozen=True)
class OutputPlan:
    """``specs``: every tensor of the artifact in walk order. ``linears``: of the layers; ``outside``: what else is
    quantized (embeddings, head). ``plain``: linears of the layers that stay in 16 bits as they were asked to.
    ``parameters``: weights of the source model."""

    specs: dict[str, Spec]
    linears: list[LinearPlan]
    parameters: int
    nbytes: int
    outside: list[LinearPlan] = field(default_factory=list)
    plain: list[LinearPlan] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What of the model the file does not hold as it was asked to."""
        return []

    @property
    def bits_per_weight(self) -> float:
        """Bits of all stored tensors over the source's parameters."""
        return 8 * self.nbytes / self.parameters


def walk_order(tensors: Mapping[str, TensorInfo], decoder: Decoder) -> list[str]:
    """Embeddings, then layer 0, 1, 2 …, then the rest: the order in which tensors are written."""

    def key(name: str) -> tuple[int, int, str]:
        layer = decoder.layer_of(name)
        if layer is not None:
            return 1, layer, name
        return (0 if "embed" in name else 2), 0, name

    return sorted(tensors, key=key)
