"""How much memory a walk takes at its peak, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qtool.convert.models.geometry import Geometry
from qtool.convert.models.shape import Decoder
from qtool.quantize.methods.method import Method, Needs
from qtool.quantize.precision import fast_bfloat16

BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}  # one forward's tokens: enough to fill the cores, little enough to fit


def peak_bytes(
    decoder: Decoder,
    shapes: Mapping[str, tuple[int, ...]],
    methods: Sequence[Method],
    tokens: int,
    device: str,
    scores: int = 0,
) -> int:
    """``shapes``: checkpoint tensor -> shape. ``tokens``: of the whole calibration set. ``scores``: of `score_bytes`.
    Bytes on the computing device: hidden states of every stream, one layer, its Gram matrices and drifts, the largest
    workspace, the codes. Within 5 % of what an accelerator's allocator reports (docs/benchmarks.md)."""
    width = 4 if device == "cpu" and not fast_bfloat16() else 2
    layer, parameters = _largest_layer(decoder, shapes)
    embedding = max(_count(shape) for name, shape in shapes.items() if "embed" in name) * width
    calibrated = [method for method in methods if method.calibrated]
    if not calibrated:
        return max(parameters * (width + 4), embedding)
    on_grams = [method for method in calibrated if method.needs.gram]
    own = sum(method.needs is Needs.OWN_STREAM for method in on_grams)
    sharing = len(on_grams) - own
    group_shapes = []
    for feed in decoder.feeds(layer):
        fed = [matrix.shape(shapes[decoder.at(layer) + matrix.tensor]) for matrix in feed.consumers]
        group_shapes.append((sum(out for out, _ in fed), fed[0][1]))
    hidden = group_shapes[0][1]
    widest = max(columns for _, columns in group_shapes)
    grams = sum(columns**2 for _, columns in group_shapes) * ((sharing > 0) + own)
    drifts = sum(min(out, columns) * columns for out, columns in group_shapes) * own
    copied = widest**2 if sharing > 1 else 0
    workspace = max((method.workspace(*shape) for method in on_grams for shape in group_shapes), default=0)
    activations = 4 * width * min(tokens, BATCH_TOKENS[device]) * widest + scores
    states = width * tokens * hidden * (1 + own)
    work = max(4 * (copied + workspace) if on_grams else 0, activations)
    walking = parameters * (width + len(on_grams)) + 4 * (grams + drifts) + work
    return states + max(walking, embedding)


def _largest_layer(decoder: Decoder, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """(its index, its parameters)."""
    parameters = dict.fromkeys(range(decoder.shape.layers), 0)
    for name, shape in shapes.items():
        index = decoder.layer_of(name)
        if index is not None:
            parameters[index] += _count(shape)
    return max(parameters.items(), key=lambda item: item[1])


def score_bytes(model: Geometry, samples: int, length: int, device: str) -> int:
    """Of one forward's attention where all scores are whole: before softmax, after it and as float32 between, beside
    two masks."""
    if not model.whole_scores:
        return 0
    width = 4 if device == "cpu" and not fast_bfloat16() else 2
    sequences = min(samples, max(1, BATCH_TOKENS[device] // length))
    return sequences * length**2 * (model.heads * (2 * width + 4) + 2 * width)


def _count(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
