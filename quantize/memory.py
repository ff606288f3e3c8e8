"""How much memory a walk takes at its peak, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qtool.quantize.architectures import Architecture
from qtool.quantize.methods import GgufMethod, Method, needs_calibration

BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}  # one forward's tokens: enough to fill the cores, little enough to fit


def peak_bytes(
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    methods: Sequence[Method],
    tokens: int,
    device: str,
) -> int:
    """``shapes``: checkpoint tensor -> shape. ``tokens``: of the whole calibration set. Bytes on the computing device:
    hidden states of every stream, one layer and its float32 copy, its Gram matrices, and the largest workspace."""
    width = 4 if device == "cpu" else 2
    layer = {name: shape for name, shape in shapes.items() if name.startswith(f"{architecture.prefix}0.")}
    parameters = sum(_count(shape) for shape in layer.values())
    embedding = max(_count(shape) for name, shape in shapes.items() if "embed" in name) * width
    calibrated = [method for method in methods if needs_calibration(method)]
    if not calibrated:
        return max(parameters * (width + 4), embedding)
    own = sum(method.own_stream for method in calibrated)
    shared = any(not method.own_stream and not isinstance(method, GgufMethod) for method in calibrated)
    group_shapes = []
    for group in architecture.groups:
        linears = [layer[f"{architecture.prefix}0.{linear}.weight"] for linear in group.linears]
        group_shapes.append((sum(out for out, _ in linears), linears[0][1]))
    hidden = group_shapes[0][1]
    grams = 4 * sum(columns**2 for _, columns in group_shapes) * (shared + 2 * own)
    workspace = max(4 * (4 * columns**2 + 4 * out * columns) for out, columns in group_shapes)
    widest = max(columns for _, columns in group_shapes)
    activations = 4 * width * min(tokens, BATCH_TOKENS[device]) * widest
    states = width * tokens * hidden * (1 + own)
    walking = parameters * (width + 4) + grams + max(workspace, activations)
    return states + max(walking, embedding)


def _count(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
