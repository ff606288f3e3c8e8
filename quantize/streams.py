"""Streams of outputs: one layer is rounded in each output's own hidden states, one feed after the other.

A feed's statistics are of the inputs that the feeds before it, in the same layer and already rounded, produce; so every
rounding can make up for what those before it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qtool.convert.models.family import Family
from qtool.convert.models.feeds import Feed
from qtool.quantize.capture import Calls, Hidden, advance, feed_through
from qtool.quantize.methods.method import Layer, LayerWork, Method
from qtool.quantize.soundness import refuse_range
from qtool.quantize.statistics import InputStatistics


@dataclass(frozen=True)
class Stream:
    """An output's hidden states before a layer, by batch, and the layer as far as it has codes."""

    method: Method
    batches: Hidden
    work: LayerWork


@dataclass
class Passage:
    """A layer that the source's stream and those of outputs pass.

    name: in messages; layer: the source's; module: what computes it, to be filled with weights; hidden: the source's
    stream; dtype: of computing; family: says which tensors take it.
    """

    name: str
    layer: Layer
    module: nn.Module
    hidden: Hidden
    calls: Calls
    dtype: torch.dtype
    family: Family
    _before: list[str] = field(init=False, default_factory=list)  # modules that the hidden states got something of

    def round(self, streams: Sequence[Stream]) -> None:
        """Every feed gets its codes in every stream. ``hidden`` moves on to the layer's outputs. Raises QtoolError for
        activations that are no numbers, or that the dtype of an output cannot hold."""
        for feed in self.layer.feeds:
            collected, peak = self._collect(feed, streams)
            for stream in streams:
                stats = collected.pop(0)
                for largest in (peak, stats.absmax.max()):
                    refuse_range(self.name, stream.method, {f"the input of {feed.name}": largest})
                stream.work.round(feed, stats)
                del stats  # large: gone before the next stream's turn
            self._before += [feed.name] if feed.adds else []

    def advance(self, stream: Stream) -> None:
        """A stream whose layer is rounded moves on to its outputs."""
        self._fill(self._state(stream))
        advance(self.module, stream.batches, self.calls)

    def _collect(self, feed: Feed, streams: Sequence[Stream]) -> tuple[list[InputStatistics], Tensor]:
        """(statistics of a feed's input in each stream, beside the source's; the source's largest magnitude). The
        batches and the copies of the layer are let go."""
        states = [self._state(stream) for stream in streams]
        collected = [self._empty(feed, stream.work) for stream in streams]
        peaks, last = [], feed is self.layer.feeds[-1]
        for number, batch in enumerate(self.hidden):
            self._fill(self.layer.weights)
            source = feed_through(self.module, feed, self._before, batch, self.calls, to_end=last)
            low, high = source.inputs.aminmax()
            peaks.append(torch.maximum(high, -low))
            if source.output is not None:
                self.hidden[number] = source.output
            for stream, state, stats in zip(streams, states, collected, strict=True):
                self._fill(state)
                fed = feed_through(self.module, feed, self._before, stream.batches[number], self.calls)
                behind = None if source.hidden is None or fed.hidden is None else source.hidden - fed.hidden
                stats.add(fed.inputs, source.inputs, stream.work.divisor(feed), behind)
        self._fill(self.layer.weights)
        for stats in collected:
            stats.finish()
        return collected, torch.stack(peaks).max()

    def _empty(self, feed: Feed, work: LayerWork) -> InputStatistics:
        """The drift goes through the weights where that makes it smaller, or where hidden states join it."""
        target = work.target(feed)
        through = feed.adds or target.shape[0] < target.shape[1]
        return InputStatistics(through=target.to(self.dtype) if through else None)

    def _state(self, stream: Stream) -> dict[str, Tensor]:
        """The layer as a reader of the output gets it; what has no codes yet is the source's."""
        stored = stream.method.stored_dtype or self.dtype
        state = stream.work.state(self.dtype, stored, self.family.casts)
        return {name: tensor.to(self.layer.device) for name, tensor in state.items()}

    def _fill(self, state: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict(dict(state), assign=True)
