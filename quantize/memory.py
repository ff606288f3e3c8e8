"""How much memory a walk takes at its peak, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qtool.convert.models.geometry import Geometry
from qtool.convert.models.shape import Decoder
from qtool.quantize.methods.method import Method, Needs
from qtool.quantize.precision import fast_bfloat16
from qtool.quantize.scaling import SEARCHED

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
    Bytes on the computing device: hidden states of every stream, one layer, the codes of the layer before, and the
    largest of what is alive while statistics are collected or codes chosen. Within 5 % of what an accelerator's
    allocator reports (docs/benchmarks.md)."""
    width = 4 if device == "cpu" and not fast_bfloat16() else 2
    layer, parameters = _largest_layer(decoder, shapes)
    embedding = max(_count(shape) for name, shape in shapes.items() if "embed" in name) * width
    calibrated = [method for method in methods if method.calibrated]
    if not calibrated:
        return max(parameters * (width + 4), embedding)
    fed = []
    for feed in decoder.feeds(layer):
        sizes = [matrix.shape(shapes[decoder.at(layer) + matrix.tensor]) for matrix in feed.consumers]
        fed.append(_Fed(sum(out for out, _ in sizes), sizes[0][1], feed.adds))
    own = [method for method in calibrated if method.needs is Needs.OWN_STREAM]
    sharing = [method for method in calibrated if method.needs is Needs.GRAM]
    hidden = fed[0].columns
    batch = width * min(tokens, BATCH_TOKENS[device])
    phases = [_of_source(fed, own, sharing, parameters, batch) + scores]
    if own:
        phases.append(_of_streams(fed, own, len(sharing), parameters, width, batch, scores))
    states = width * tokens * hidden * (1 + len(own))
    codes = parameters * (len(own) + len(sharing))  # of the layer before: a byte a weight
    return states + max(parameters * width + codes + max(phases), embedding)


@dataclass(frozen=True)
class _Fed:
    """``out``: rows of all consumers; ``adds``: as `Feed.adds`."""

    out: int
    columns: int
    adds: bool

    def statistics(self, width: int) -> int:
        """Bytes of its Gram matrix and drift in a stream, and of the weights that the drift goes through."""
        through = self.adds or self.out < self.columns
        drift = (4 + width) * self.out * self.columns if through else 4 * self.columns**2
        return 4 * self.columns**2 + drift


def _of_source(
    fed: Sequence[_Fed], own: Sequence[Method], sharing: Sequence[Method], parameters: int, batch: int
) -> int:
    """Bytes while the source's statistics are collected, or outputs that share them search scales and choose codes.
    ``batch``: bytes of one forward's tokens in one channel."""
    widest, hidden = max(one.columns for one in fed), fed[0].columns
    asked = bool(sharing) or any(method.asks_source for method in own)
    grams = 4 * sum(one.columns**2 for one in fed) if asked else 0
    # three of the widest in its MLP and one of the batch before; three inputs and what they are added to
    forward = batch * (4 * widest + 4 * hidden)
    most, done = 0, 0
    for one in fed:
        searching = max((method.workspace(one.out, one.columns) for method in sharing), default=0)
        copied = one.columns**2 if len(sharing) > 1 else 0  # scaled for one output, kept for the next
        most = max(most, done + 4 * (searching + copied))
        most = max([most] + [4 * SEARCHED * one.out * one.columns for method in own if method.asks_source])
        done += one.out * one.columns
    return grams + max(forward, most + parameters * max(0, len(sharing) - 1))


def _of_streams(
    fed: Sequence[_Fed], own: Sequence[Method], sharing: int, parameters: int, width: int, batch: int, scores: int
) -> int:
    """Bytes while one feed's statistics are collected in every stream, or its codes chosen in one."""
    widest, hidden = max(one.columns for one in fed), fed[0].columns
    # three of the widest in its MLP, an input of the batch before; or two inputs and their difference, in float32 and
    # twice where one of them is divided by a scale; in either case the hidden states on both sides
    gap = 8 * widest // width if any(method.asks_source for method in own) else widest
    forward = max(batch * (4 * widest + 7 * hidden) + scores, batch * (2 * widest + 4 * hidden + gap))
    most, done = 0, 0
    for one in fed:
        collecting = len(own) * parameters * width + forward  # a copy of the layer for each
        choosing = 4 * max(method.workspace(one.out, one.columns) for method in own)
        most = max(most, len(own) * (done + one.statistics(width)) + max(collecting, choosing))
        done += one.out * one.columns
    return sharing * parameters + most


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
