"""What a survey takes (survey.py): for the plan, and for how many layers it works at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from qtool.convert.models.shape import Decoder
from qtool.quantize.survey_errors import ROWS, layers_at_once

TOKENS = 8192  # of the calibration set, which a survey looks at
Shapes = Mapping[str, tuple[int, ...]]


def survey_bytes(decoder: Decoder, shapes: Shapes, length: int, width: int, device: torch.device) -> tuple[int, int]:
    """(on the computing device, in host memory besides) while types are measured, windows being ``length`` tokens:
    the inputs of every layer on the host; on the device the hidden states and their gradients, a layer, the sums of the
    layers that are worked at once with their factors, or the head with a window's chances. ``width``: of a number
    computed with."""
    geometry, tokens = decoder.shape, max(2, TOKENS // length) * length
    states = tokens * geometry.hidden * width
    layer = largest(decoder, shapes)
    outputs = sum(matrix.shape(shapes[decoder.at(layer) + matrix.tensor])[0] for matrix in decoder.matrices(layer))
    own = sums_bytes(decoder, shapes, layer)
    sums = own * layers_at_once(device, own) + _working(decoder, shapes, layer, device)
    weights = sum(_count(shapes, decoder.at(layer)))
    activations = TOKENS * outputs * width * 3
    head = geometry.vocab * (geometry.hidden * (width + 4) + length * 24)
    return 2 * states + max(weights * (width + 4) + sums + activations, head), states * geometry.layers


def sums_bytes(decoder: Decoder, shapes: Shapes, layer: int) -> int:
    """Of one layer: of each input its Gram matrix and its factor, of each matrix H."""
    columns = [[matrix.shape(shapes[decoder.at(layer) + matrix.tensor])[1] for matrix in feed.consumers]
               for feed in decoder.feeds(layer)]  # fmt: skip
    return sum(4 * one[0] ** 2 * (2 + len(one)) for one in columns)


def largest(decoder: Decoder, shapes: Shapes) -> int:
    """The layer with the most weights."""
    return max(range(decoder.shape.layers), key=lambda one: sum(_count(shapes, decoder.at(one))))


def _working(decoder: Decoder, shapes: Shapes, layer: int, device: torch.device) -> int:
    """While problems are laid side by side and factorized: copies of the widest input's matrix; and some copies of the
    rows that are rounded."""
    matrices = [matrix.shape(shapes[decoder.at(layer) + matrix.tensor]) for matrix in decoder.matrices(layer)]
    widest = max(columns for _, columns in matrices)
    at_once = layers_at_once(device, sums_bytes(decoder, shapes, layer))
    rows = sum(4 * min(out, ROWS) * columns for out, columns in matrices)
    return 12 * widest**2 + 10 * rows * at_once


def _count(shapes: Shapes, prefix: str) -> Iterator[int]:
    return (math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))
