"""NF4 through bitsandbytes' own kernels, one tensor at a time.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from qtool import QtoolError
from qtool.convert.formats import bnb_nf4
from qtool.convert.formats.codes import Nested, Nf4Blocks
from qtool.convert.formats.shards import Shards
from qtool.quantize.methods.method import SKIPPED, Inputs, Layer, LayerCodes, Method, Name, Needs

INSTALL = "pip install 'qtool-llm[nf4]'"


class Nf4Method(Method):
    """NF4 by bitsandbytes; needs no calibration. What is not quantized keeps the source's dtype."""

    short: ClassVar[Mapping[str, Mapping[str, Any]]] = {"nf4": {}}

    method: Literal["nf4"]
    name: Name = "nf4"
    double_quant: bool = True
    blocksize: Literal[64] = 64

    @property
    def needs(self) -> Needs:
        """NF4's values are fixed."""
        return Needs.NOTHING

    @property
    def container(self) -> Shards:
        """bitsandbytes'."""
        return Shards(bnb_nf4.quantization_config(self.double_quant, SKIPPED), None, self.blocksize)

    @property
    def packages(self) -> tuple[str, ...]:
        """Its kernels choose the codes."""
        return ("bitsandbytes",)

    def require(self, device: torch.device) -> None:
        """Raises QtoolError (exit 3)."""
        load_bitsandbytes()

    def quantize(self, layer: Layer, inputs: Inputs) -> LayerCodes:
        """In the dtype of the checkpoint; one matrix at a time is on the device. Only ``|W - Ŵ| / |W|`` is recorded."""
        output = LayerCodes(tensors=layer.others)
        for matrix in layer.matrices:
            weight = layer.source(matrix)
            blocks = quantize_nf4(weight, self.blocksize, self.double_quant)
            output.codes[matrix.module] = blocks
            source = weight.float()
            error = blocks.dequantize().sub_(source).norm() / source.norm().clamp_min(1e-30)
            output.records[matrix.module] = {"frobenius": float(f"{float(error):.6g}")}
        return output


def load_bitsandbytes() -> Any:
    """`bitsandbytes.functional`. Raises QtoolError (exit 3) with the command that installs it."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an inference kernel that is not needed
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise QtoolError(f"method nf4 needs bitsandbytes, which is not installed here. Run: {INSTALL}", 3) from error
    return functional


def quantize_nf4(weight: torch.Tensor, blocksize: int, double_quant: bool) -> Nf4Blocks:
    """A linear ``[out, in]`` in float16, bfloat16 or float32 -> its blocks; the dtype is part of the result, because a
    reader dequantizes to it."""
    functional = load_bitsandbytes()
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
    )
    nested = None
    if double_quant:
        second = state.state2
        nested = Nested(second.absmax, second.code, second.blocksize, float(state.offset))
    out, columns = weight.shape
    return Nf4Blocks(packed, state.absmax, state.code, (out, columns), blocksize, weight.dtype, nested)
