"""llama.cpp's block formats: each matrix in the type that the plan gives it, its columns weighed by importance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from qtool import QtoolError
from qtool.convert.files.writer import Spec
from qtool.convert.formats.gguf.format import Gguf
from qtool.convert.formats.gguf.ggml import FLOATS, load_gguf
from qtool.convert.formats.plan import LinearPlan
from qtool.quantize.methods.ggml import fits, load_library, quantize_ggml, quantizer_package
from qtool.quantize.methods.method import Inputs, Layer, LayerCodes, Method, Name, Needs

IMPORTANCE = "importance"
TINY = 1e-12  # its square times a weight's is still a normal float32
UNWEIGHED = ("Q8_0", *FLOATS)  # types whose blocks no importance changes
FileType = Literal["Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0", "F16", "BF16"]


class GgufMethod(Method):
    """A .gguf file for llama.cpp, each tensor in the type that llama.cpp's own rules give it.

    ``imatrix``: weigh errors by the mean square of each input channel over the calibration text (true), by a file that
    llama.cpp's llama-imatrix made (its path), or by nothing but the weights (false).
    """

    short: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"name": name, "type": name} for name in get_args(FileType)
    }

    method: Literal["gguf"]
    name: Name = "gguf"
    type: FileType = "Q4_K_M"
    imatrix: bool | Annotated[str, Field(min_length=1)] = True
    pre_tokenizer: str | None = None  # llama.cpp's name of the split rules, where qtool cannot tell it

    @property
    def needs(self) -> Needs:
        """The text's importance matrix, where the blocks of this type depend on one."""
        return Needs.CHANNELS if self.imatrix is True and self.type not in UNWEIGHED else Needs.NOTHING

    @property
    def container(self) -> Gguf:
        """llama.cpp's file."""
        return Gguf(self.type, self.pre_tokenizer)

    @property
    def packages(self) -> tuple[str, ...]:
        """The file's writer, and the C code that chooses the codes."""
        return ("gguf", *quantizer_package())

    @property
    def kept_as(self) -> str | None:
        """The rows that the blocks were weighed by, where qtool measured them."""
        return IMPORTANCE if self.needs is Needs.CHANNELS else None

    def kept_specs(self, matrices: Sequence[LinearPlan]) -> dict[str, Spec]:
        """Mean squares of each matrix's input channels."""
        return {matrix.name: (torch.float32, (matrix.columns,)) for matrix in matrices}

    @property
    def importance_file(self) -> str | None:
        """As `imatrix` names it."""
        return self.imatrix if isinstance(self.imatrix, str) else None

    def require(self, device: torch.device) -> None:
        """Raises QtoolError (exit 3)."""
        load_gguf()
        if self.type not in FLOATS and device.type == "cpu":
            load_library()

    def quantize(self, layer: Layer, inputs: Inputs) -> LayerCodes:
        """Records ``|W - Ŵ| / |W|`` and, where importance is known, the same with every column weighed by it: the
        relative output error on inputs whose channels are uncorrelated. Nothing is recorded outside the layers."""
        output = LayerCodes(tensors=layer.others)
        for matrix in layer.matrices:
            module, weight = matrix.module, layer.source(matrix)
            given, kind = inputs.importance.get(module), layer.plans[module].type
            row = None if given is None else live(given.to(layer.device))
            if not fits(weight, kind):
                raise QtoolError(f"{module}: does not fit {kind}, which ends at 65504; set `type: BF16`.")
            blocks = quantize_ggml(weight, kind, row)
            output.codes[module] = blocks
            if given is not None and self.kept_as:
                output.kept[module] = given.float().cpu()
            if layer.index is None:
                continue
            source = weight.float()
            error = blocks.dequantize().sub_(source).square_()
            power = source.square_()
            output.records[module] = {"frobenius": _ratio(error, power), **inputs.figures.get(module, {})}
            if row is not None:
                output.records[module]["weighted_error"] = _ratio(error * row, power * row)
        return output

    def remarks(self, ledger: Mapping[str, Mapping[str, float]]) -> list[str]:
        """What a named importance matrix does not hold."""
        without = [linear for linear, record in ledger.items() if "weighted_error" not in record]
        if self.importance_file is None or not without:
            return []
        return [f"{len(without)} of {len(ledger)} linears have no row in the importance matrix: {without[0]} first"]


def live(row: Tensor) -> Tensor:
    """``row [in]``, mean squares, without zeros: channels that no text moved count as the least that any channel
    counted; where a matrix saw nothing at all, all count alike.

    Where the weights that share a scale all count 0, or so little or much that the products leave float32, ggml finds
    no scale and writes zeros for them.
    """
    row = row.float()
    top = float(row.max())
    if top == 0:
        return torch.ones_like(row)
    if not TINY < top < 1 / TINY:
        row = row / top
    return row.clamp_min(float(row[row >= TINY].min()))


def _ratio(error: Tensor, power: Tensor) -> float:
    return float(f"{float((error.sum() / power.sum().clamp_min(1e-30)).sqrt()):.6g}")
