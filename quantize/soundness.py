"""Whether a layer's source weights and activations can be those of a model that works."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from qtool import QtoolError
from qtool.quantize.methods.method import Method, Statistics
from qtool.quantize.stacks import Stack

FLOAT16_MAX = 65504.0


def refuse_unsound(weights: Mapping[str, Tensor], where: str, norm_offset: Callable[[str], float]) -> None:
    """Raises QtoolError, its message begun by ``where``, for a tensor that holds NaN or Inf, and for a matrix or a norm
    of zeros alone, whose output says nothing (verify refuses it too). ``norm_offset``: what the norm of a weight adds
    to it; zeros are a weight like any other where it adds 1."""
    facts = [(tensor.isfinite().all(), tensor.any()) for tensor in weights.values()]
    answers = torch.stack([fact for pair in facts for fact in pair]).tolist()  # one wait for the device
    for (name, tensor), finite, some in zip(weights.items(), answers[::2], answers[1::2], strict=True):
        if not finite:
            raise QtoolError(f"{where}{name}: the source weight holds NaN or Inf. Download the model again.")
        if not some and (tensor.ndim > 1 or (name.endswith("norm.weight") and not norm_offset(name))):
            raise QtoolError(
                f"{where}{name}: the source weight is all zero: of a model that is damaged, or was enlarged and not "
                "trained yet."
            )


def refuse_unsound_values(name: str, tensor: Tensor) -> None:
    """Raises QtoolError for a tensor outside the layers that holds NaN or Inf: codes would not tell."""
    if not bool(tensor.isfinite().all()):
        raise QtoolError(f"{name}: holds NaN or Inf.")


def refuse_inputs(
    layer: str, method: Method, inputs: Iterable[tuple[Stack, Statistics]], beside: Mapping[str, Tensor] | None = None
) -> None:
    """`refuse_range` of the inputs of stacks. ``beside``: a stack's name -> the largest magnitude in the source, where
    the statistics are of a stream, which is broken where the source's does not fit."""
    given = list(inputs)
    peaks = [(stack.name, stats.absmax.max()) for stack, stats in given]
    if beside is not None:
        peaks = [(stack.name, beside[stack.name]) for stack, _ in given] + peaks
    found = {stack.name: (stack, stats) for stack, stats in given}

    def culprit(name: str) -> str:
        stack, stats = found[name]
        return stack.problems[stats.first_unsound][0].module

    _refuse(layer, method, "the input of ", peaks, culprit)


def refuse_range(layer: str, method: Method, what: str, peak: Tensor) -> None:
    """``peak``: the largest magnitude of ``what`` in ``layer`` on the calibration text. Raises QtoolError for NaN or
    Inf, and for more than the dtype of an output holds."""
    _refuse(layer, method, "", [(what, peak)], str)


def _refuse(
    layer: str, method: Method, before: str, peaks: Sequence[tuple[str, Tensor]], culprit: Callable[[str], str]
) -> None:
    """``culprit``: what exactly is NaN or Inf, where several are called by one name."""
    values = torch.stack([peak.float() for _, peak in peaks]).tolist()  # one wait for the device
    for (what, _), value in zip(peaks, values, strict=True):
        if not value < float("inf"):
            raise QtoolError(
                f"{layer}: {before}{culprit(what)} is NaN or Inf on the calibration text; the source model is broken."
            )
        if method.stored_dtype == torch.float16 and value > FLOAT16_MAX:
            raise QtoolError(
                f"{layer}: {before}{what} reaches {value:.0f}, more than float16 holds (65504); served in float16 this "
                f"model would print '!!!'. Set `dtype: bfloat16` for output {method.name!r}."
            )
