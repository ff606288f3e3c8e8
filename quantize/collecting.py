"""Statistics of a layer's inputs in the source's stream, and what rare experts are shown beside their own tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qtool import QtoolError
from qtool.quantize.capture import Calls, Enough, Hidden, captured, nothing, run_layer
from qtool.quantize.experts import Routed, Taker, gate_of, inner, mixture_of
from qtool.quantize.methods.method import Inputs, Statistics
from qtool.quantize.ranks import HERE, Home
from qtool.quantize.routed import SAMPLE, ExpertSettings, RoutedStatistics
from qtool.quantize.stacks import Stack
from qtool.quantize.statistics import InputStatistics

SUMS = ("gram", "drift", "abs_sum", "absmax", "square_sum", "mass", "power")  # fields of statistics that are sums


@dataclass
class Sample:
    """Some tokens' inputs of a mixture, evenly from all batches: what a rare expert would see of any token.

    tokens: of all batches together, whichever rank they lie on; home: where the sample is.
    """

    tokens: int
    home: Home = HERE
    _parts: list[Tensor] = field(default_factory=list)

    def take(self, call: Routed) -> None:
        """Of one batch."""
        self._parts += self.home.rows(call.hidden[:: max(1, self.tokens // SAMPLE)].clone())

    def typical(self, stack: Stack, mixture: Any) -> Callable[[int], Tensor]:
        """As `RoutedStatistics.finish` asks. ``mixture``: the module that computes the experts, with its weights."""
        if not self._parts:  # they are not here
            return lambda _: torch.empty(0)
        hidden = torch.cat(self._parts)
        if not stack.inner:
            return lambda _: hidden
        return lambda expert: inner(mixture, mixture.gate_up_proj[expert : expert + 1], hidden, [len(hidden)])


def source_statistics(
    layer: nn.Module,
    stacks: Sequence[Stack],
    hidden: Hidden,
    calls: Calls,
    settings: ExpertSettings,
    channels_only: bool,
    stay: bool,
    tokens: int,
    home: Home = HERE,
) -> dict[str, Statistics]:
    """A stack's name -> the statistics of its input in the source's stream, at ``home``. ``hidden`` moves on to the
    layer's outputs, unless it shall ``stay``. ``tokens``: as `Sample`'s."""
    shared = empty_statistics(layer, stacks, settings, channels_only, home)
    routed = {stack.inner: shared[stack.name] for stack in stacks if stack.routed}
    sample = Sample(tokens, home)
    for number, states in enumerate(hidden):
        inputs: dict[str, Tensor] = {}
        enough = stay and not routed
        watched = _Watched(routed, sample)
        if not len(states):
            inputs |= watched.none(layer, stacks, states)
        with suppress(Enough), captured(layer, stacks, inputs.__setitem__, watched.take, enough):
            output = run_layer(layer, states, calls)
            if not stay:
                hidden[number] = output
        for stack in stacks:
            stats = shared[stack.name]
            if isinstance(stats, InputStatistics):
                gate = gate_of(layer, stack.gate, watched.hidden) if stack.gate else None
                stats.add(inputs[stack.name], gate=gate)
    finish(layer, stacks, shared, sample)
    return shared


def empty_statistics(
    layer: nn.Module, stacks: Sequence[Stack], settings: ExpertSettings, channels_only: bool, home: Home = HERE
) -> dict[str, Statistics]:
    """Before any batch, in the source's stream."""
    shared: dict[str, Statistics] = {}
    for stack in stacks:
        if stack.routed:
            number = mixture_of(layer).num_experts
            shared[stack.name] = RoutedStatistics(number, settings, channels_only, home=home)
        else:
            exponent = settings.exponent
            shared[stack.name] = InputStatistics(channels_only=channels_only, exponent=exponent, home=home)
    return shared


def spread(found: Mapping[str, Statistics], home: Home, takers: Collection[int]) -> None:
    """Whole statistics, from their home to all ranks that take them."""
    if set(takers) <= {home.owner}:
        return
    for stats in found.values():
        held = {name: getattr(stats, name) for name in SUMS} if home.mine else {}
        sums = {name: tensor for name, tensor in held.items() if tensor is not None}
        for name, tensor in home.share(sums, home.ranks.rank in takers).items():
            setattr(stats, name, tensor)
        if isinstance(stats, RoutedStatistics) and not home.mine:
            stats.agreed = None  # a figure of the record, which its home writes


def mean_squares(layer: str, stacks: Sequence[Stack], shared: Mapping[str, Statistics]) -> Inputs:
    """Of every matrix the mean squares of its input channels; of an expert its tokens, too. Raises QtoolError naming
    the ``layer`` where they are no numbers."""
    squares: dict[str, Tensor] = {}
    figures: dict[str, Mapping[str, float]] = {}
    for stack in stacks:
        stats = shared[stack.name]
        rows = stats.mean_square
        if not bool(rows.isfinite().all()):
            raise QtoolError(
                f"{layer}: the input of {stack.problems[stats.first_unsound][0].module} is NaN or Inf on the "
                "calibration text; the source model is broken."
            )
        for number, problem in enumerate(stack.problems):
            squares |= {matrix.module: rows[number] if stack.routed else rows for matrix in problem}
        if isinstance(stats, RoutedStatistics):
            own = zip(stack.problems, stats.figures(), strict=True)
            figures |= {matrix.module: figure for problem, figure in own for matrix in problem}
    return Inputs(importance=squares, figures=figures)


def finish(layer: nn.Module, stacks: Sequence[Stack], found: dict[str, Statistics], sample: Sample) -> None:
    """Make statistics whole. ``layer``: with the weights of their stream."""
    for stack in stacks:
        stats = found[stack.name]
        if isinstance(stats, InputStatistics):
            stats.finish()
        elif stats.counts:
            stats.finish(sample.typical(stack, mixture_of(layer)))


@dataclass
class _Watched:
    """The call of a mixture in one forward. ``routed``: statistics of experts' inputs, and of those of their downs."""

    routed: Mapping[bool, Statistics]
    sample: Sample
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))

    def none(self, layer: nn.Module, stacks: Sequence[Stack], states: Tensor) -> dict[str, Tensor]:
        """Of a batch without rows: the plain stacks' inputs."""
        fed = nothing(layer, stacks, states)
        if self.routed and fed.routed is not None:
            self.take(fed.routed)(states.new_zeros(0, mixture_of(layer).down_proj.shape[-1]))
        return fed.inputs

    def take(self, call: Routed) -> Taker:
        """The experts' inputs now; the inputs of their down matrices when they are made."""
        self.hidden = call.hidden
        self.sample.take(call)
        own, made = self.routed[False], self.routed[True]
        assert isinstance(own, RoutedStatistics)
        assert isinstance(made, RoutedStatistics)
        own.add(call.inputs, call.weights, call.counts)
        return lambda x: made.add(x, call.weights, call.counts)
