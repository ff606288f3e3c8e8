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
from qtool.quantize.capture import Calls, Hidden, Part, Parted, parts_of
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
    parts: tuple[Part, ...] = field(init=False)
    _parted: Parted = field(init=False)

    def __post_init__(self) -> None:
        self.parts, self._parted = parts_of(self.layer.feeds), Parted(self.module, self.calls)

    def round(self, streams: Sequence[Stream]) -> None:
        """Every feed gets its codes in every stream. ``hidden`` moves on to the layer's outputs, the streams as far as
        the last part's beginning. Raises QtoolError for activations that are no numbers, or that the dtype of an output
        cannot hold."""
        for part in self.parts:
            for feed in part.feeds:
                collected, peak = self._collect(part, feed, streams)
                for stream in streams:
                    stats = collected.pop(0)
                    for largest in (peak, stats.absmax.max()):
                        refuse_range(self.name, stream.method, {f"the input of {feed.name}": largest})
                    stream.work.round(feed, stats)
                    del stats  # large: gone before the next stream's turn
            for stream in streams if part is not self.parts[-1] else ():
                self._move(stream, part)

    def advance(self, stream: Stream) -> None:
        """A stream whose layer is rounded moves on to its outputs."""
        self._move(stream, self.parts[-1])

    def _move(self, stream: Stream, part: Part) -> None:
        """A stream at the beginning of ``part`` moves on to its end."""
        self._fill(self._state(stream))
        for number, batch in enumerate(stream.batches):
            _, stream.batches[number] = self._parted.run(part, batch)

    def _collect(self, part: Part, feed: Feed, streams: Sequence[Stream]) -> tuple[list[InputStatistics], Tensor]:
        """(statistics of a feed's input in each stream, beside the source's; the source's largest magnitude). The
        batches and the copies of the layer are let go. The source moves on with the part's last feed."""
        states = [self._state(stream) for stream in streams]
        collected = [self._empty(feed, stream.work) for stream in streams]
        peaks, last = [], feed is part.feeds[-1]
        for number, batch in enumerate(self.hidden):
            self._fill(self.layer.weights)
            source, ended = self._parted.run(part, batch, feed, to_end=last)
            low, high = source.aminmax()
            peaks.append(torch.maximum(high, -low))
            for stream, state, stats in zip(streams, states, collected, strict=True):
                self._fill(state)
                own = stream.batches[number]
                inputs, _ = self._parted.run(part, own, feed, to_end=False)
                stats.add(inputs, source, stream.work.divisor(feed), batch - own if feed.adds else None)
            if last:
                self.hidden[number] = ended
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
