"""How much memory a walk takes at its peak, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qtool.convert.models.geometry import Geometry
from qtool.convert.models.shape import Decoder
from qtool.quantize.methods.method import Method, Needs
from qtool.quantize.precision import fast_bfloat16
from qtool.quantize.ranks import AT_ONCE as AT_ONCE_RECEIVED
from qtool.quantize.routed import SAMPLE
from qtool.quantize.scaling import AT_ONCE, SEARCHED
from qtool.quantize.stacks import Stack, steps_of
from qtool.quantize.statistics import GRAM_BLOCK

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # one forward's tokens: enough to fill the cores, little enough to fit


def peak_bytes(
    decoder: Decoder,
    shapes: Mapping[str, tuple[int, ...]],
    methods: Sequence[Method],
    tokens: int,
    device: str,
    scores: int = 0,
    ranks: int = 1,
    mine: Sequence[Method] | None = None,
) -> int:
    """``shapes``: checkpoint tensor -> shape. ``tokens``: of the whole calibration set. ``scores``: of `score_bytes`.
    ``ranks``: processes that walk together, ``mine``: the outputs that this one makes, or helps to make (None: all).
    Bytes on the computing device: hidden states of every stream (of a looped model the turns' side by side), one layer,
    the codes of the layer before, and the largest of what is alive while statistics are collected or codes chosen.
    Within 5 % of what an accelerator's allocator reports (docs/benchmarks.md); several ranks' is reckoned alike, and
    not measured yet."""
    width = 4 if device == "cpu" and not fast_bfloat16() else 2
    layer, parameters = _largest_layer(decoder, shapes)
    embedding = max(_count(shape) for name, shape in shapes.items() if "embed" in name) * width
    if not any(method.calibrated for method in methods):
        return max(parameters * (width + 4), embedding)
    steps = [
        [_Fed.of(stack, decoder.at(layer), shapes) for stack in step.stacks] for step in steps_of(decoder.feeds(layer))
    ]
    streams = sum(method.needs is Needs.OWN_STREAM for method in methods)
    made = methods if mine is None else mine
    own = [method for method in made if method.needs is Needs.OWN_STREAM]
    sharing = [method for method in made if method.needs is Needs.GRAM]
    tokens *= decoder.shape.loops
    tokens = min(tokens, -(-tokens // (BATCH_TOKENS[device] * ranks)) * BATCH_TOKENS[device])  # this rank's
    hidden = steps[0][0].columns
    batch = width * min(tokens, BATCH_TOKENS[device])
    phases = [_of_source([fed for step in steps for fed in step], own, sharing, parameters, width, batch) + scores]
    if streams:
        asking = any(method.asks_source for method in methods)
        phases.append(_of_streams(steps, own, len(sharing), parameters, width, batch, scores, streams, asking, ranks))
    states = width * tokens * hidden * (1 + streams)
    codes = parameters * (len(own) + len(sharing))  # of the layer before: a byte a weight
    told = 0
    if ranks > 1:  # the layer as each stream's home told it, a stack's sums of a batch, and those received
        told = streams * parameters * width + 8 * GRAM_BLOCK[device] * max(
            fed.columns for step in steps for fed in step
        )
        told += 4 * AT_ONCE_RECEIVED
    return states + told + max(parameters * width + codes + max(phases), embedding)


@dataclass(frozen=True)
class _Fed:
    """A stack. ``out``: rows of all consumers of a problem; ``adds``: as `Feed.adds`; ``problems``: one, or the
    experts."""

    out: int
    columns: int
    adds: bool
    problems: int
    routed: bool

    @classmethod
    def of(cls, stack: Stack, at: str, shapes: Mapping[str, tuple[int, ...]]) -> _Fed:
        """``at``: the layer's prefix."""
        sizes = [matrix.shape(shapes[at + matrix.tensor]) for matrix in stack.problems[0]]
        return cls(sum(out for out, _ in sizes), sizes[0][1], stack.adds, len(stack.problems), stack.routed)

    @property
    def weights(self) -> int:
        """Of all its matrices."""
        return self.problems * self.out * self.columns

    @property
    def gram(self) -> int:
        """Numbers of its Gram matrices."""
        return self.problems * self.columns**2

    @property
    def at_once(self) -> int:
        """Problems that are worked on at once."""
        return min(self.problems, AT_ONCE)

    def statistics(self, width: int) -> int:
        """Bytes of its Gram matrix and drift in a stream, and of the weights that the drift goes through."""
        through = self.adds or self.out < self.columns
        drift = (4 + width) * self.weights if through else 4 * self.gram
        return 4 * self.gram + drift

    def workspace(self, method: Method) -> int:
        """Float32 numbers while a method chooses its codes."""
        return self.at_once * method.workspace(self.out, self.columns)


def _of_source(
    fed: Sequence[_Fed], own: Sequence[Method], sharing: Sequence[Method], parameters: int, width: int, batch: int
) -> int:
    """Bytes while the source's statistics are collected, or outputs that share them search scales and choose codes.
    ``batch``: bytes of one forward's tokens in one channel."""
    widest, hidden = max(one.columns for one in fed), fed[0].columns
    asked = bool(sharing) or any(method.asks_source for method in own)
    grams = 4 * sum(one.gram for one in fed) if asked else 0
    # three of the widest in its MLP and one of the batch before; three inputs and what they are added to
    forward = batch * (4 * widest + 4 * hidden) + _mixed(fed, width, batch)
    most, done = 0, 0
    for one in fed:
        searching = max((one.workspace(method) for method in sharing), default=0)
        copied = one.gram if len(sharing) > 1 else 0  # scaled for one output, kept for the next
        stacked = 2 * width * one.weights if one.routed else 0  # experts' weights below each other, as they are made so
        most = max(most, done + 4 * (searching + copied) + stacked)
        searched = 4 * SEARCHED * one.at_once * one.out * one.columns + stacked
        most = max([most] + [searched for method in own if method.asks_source])
        done += one.weights
    return grams + max(forward, most + parameters * max(0, len(sharing) - 1))


def _of_streams(
    steps: Sequence[Sequence[_Fed]],
    own: Sequence[Method],
    sharing: int,
    parameters: int,
    width: int,
    batch: int,
    scores: int,
    streams: int,
    asking: bool,
    ranks: int,
) -> int:
    """Bytes while one step's statistics are collected in every stream, or its codes chosen in one."""
    fed = [one for step in steps for one in step]
    widest, hidden = max(one.columns for one in fed), fed[0].columns
    # three of the widest in its MLP, an input of the batch before; or two inputs and their difference, in float32 and
    # twice where one of them is divided by a scale; in either case the hidden states on both sides
    gap = 8 * widest // width if asking else widest
    forward = max(batch * (4 * widest + 7 * hidden) + scores, batch * (2 * widest + 4 * hidden + gap))
    forward += _mixed(fed, width, batch)
    mixed = any(one.routed for one in fed)
    most, done = 0, 0
    for step in steps:
        routed = any(one.routed for one in step)  # as streams.together
        copies = (1 if routed else streams) + mixed  # of the layer, for each stream; experts, as they are put together
        collecting = (copies if ranks == 1 else mixed) * parameters * width + forward
        choosing = 4 * max((one.workspace(method) for method in own for one in step), default=0)
        statistics = min(len(own), 1 if routed else len(own)) * sum(one.statistics(width) for one in step)
        most = max(most, len(own) * done + statistics + max(collecting, choosing))
        done += sum(one.weights for one in step)
    return sharing * parameters + most


def _mixed(fed: Sequence[_Fed], width: int, batch: int) -> int:
    """Bytes that a forward of a mixture takes beside: its sum in float32, one expert's outputs, a sample of tokens."""
    hidden = fed[0].columns
    if not any(one.routed for one in fed):
        return 0
    return 2 * (4 // width) * batch * hidden + width * SAMPLE * hidden


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
    sequences = min(samples, max(1, BATCH_TOKENS[device] // (length * model.loops)))
    return sequences * length**2 * (model.heads * (2 * width + 4) + 2 * width)


def _count(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
