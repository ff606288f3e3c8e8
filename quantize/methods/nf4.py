"""NF4 through bitsandbytes' own kernels, one tensor at a time.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.formats.codes import Nested, Nf4Blocks
from qtool.convert.models.feeds import Matrix
from qtool.quantize.folding import LayerOutput, unquantized
from qtool.quantize.methods.sections import Nf4Method

INSTALL = "pip install 'qtool-llm[nf4]'"


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


def quantize_layer(
    method: Nf4Method, matrices: Sequence[Matrix], weights: Mapping[str, torch.Tensor], device: torch.device
) -> LayerOutput:
    """``weights``: tensor name -> tensor in the dtype of the checkpoint; one matrix at a time is on ``device``. No
    statistics are needed, so only ``|W - Ŵ| / |W|`` is recorded."""
    output = LayerOutput(tensors=unquantized(matrices, weights))
    for matrix in matrices:
        weight = matrix.of(weights[matrix.tensor]).to(device)
        blocks = quantize_nf4(weight, method.blocksize, method.double_quant)
        output.codes[matrix.module] = blocks
        source = weight.float()
        error = blocks.dequantize().sub_(source).norm() / source.norm().clamp_min(1e-30)
        output.records[matrix.module] = {"frobenius": float(f"{float(error):.6g}")}
    return output
