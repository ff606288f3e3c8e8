"""Streams of outputs: one layer is rounded in each output's own hidden states, one step after the other.

Every rank advances its batches of every stream. A stream's statistics are summed at its home, the rank that makes the
output: it rounds, alone or with a crew, and tells the others what they need to compute the layer as it is by then.

A step's statistics are of the inputs that those before it, in the same layer and already rounded, produce; so every
rounding can make up for what those before it did. A mixture's router, too, sees the inputs of the stream: experts are
rounded for the tokens that will reach them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from qtool.convert.models.experts import GATE_UP
from qtool.convert.models.shape import Decoder
from qtool.quantize.capture import Calls, Fed, Hidden, Part, Parted, parts_of
from qtool.quantize.collecting import Sample, finish, spread
from qtool.quantize.crew import Crew
from qtool.quantize.experts import gate_of, inner, mixture_of
from qtool.quantize.methods.method import Layer, LayerWork, Method, Statistics
from qtool.quantize.position import Position
from qtool.quantize.ranks import Home, Ranks
from qtool.quantize.routed import ExpertSettings, RoutedStatistics
from qtool.quantize.scaling import AT_ONCE
from qtool.quantize.soundness import refuse_inputs
from qtool.quantize.stacks import Stack, Step, steps_of
from qtool.quantize.statistics import InputStatistics


@dataclass(frozen=True)
class Stream:
    """An output's hidden states before a layer, by batch, who rounds it, and the layer as far as it has codes (None:
    that is not here). held: the layer as its home told it, where there are several ranks."""

    method: Method
    batches: Hidden
    home: Home
    crew: Crew
    work: LayerWork | None
    held: dict[str, Tensor]

    @property
    def here(self) -> LayerWork:
        """The work, on the ranks that do it."""
        assert self.work is not None
        return self.work


@dataclass
class Passage:
    """A layer that the source's stream and those of outputs pass.

    name: in messages; layer: the source's; source: its tensors as ``module`` holds them, which computes it; hidden: the
    source's stream; dtype: of computing; decoder: says which tensors take it, and how experts are held; tokens: of the
    calibration set; position: is told what is in work.
    """

    name: str
    layer: Layer
    module: nn.Module
    source: Mapping[str, Tensor]
    hidden: Hidden
    calls: Calls
    dtype: torch.dtype
    decoder: Decoder
    settings: ExpertSettings
    tokens: int
    position: Position
    parts: tuple[Part, ...] = field(init=False)
    _parted: Parted = field(init=False)

    def __post_init__(self) -> None:
        self.parts, self._parted = parts_of(steps_of(self.layer.feeds)), Parted(self.module, self.calls)

    def round(self, streams: Sequence[Stream]) -> None:
        """Every stack gets its codes in every stream. ``hidden`` moves on to the layer's outputs, the streams as far as
        the last part's beginning. Raises QtoolError for activations that are no numbers, or that the dtype of an output
        cannot hold."""
        for part in self.parts:
            for step in part.steps:
                for some in together(step, streams):
                    self._round(part, step, some, step is part.steps[-1] and some[-1] is streams[-1])
            for stream in streams if part is not self.parts[-1] else ():
                self._move(stream, part)

    def _round(self, part: Part, step: Step, streams: Sequence[Stream], last: bool) -> None:
        """A step's stacks get their codes in some streams; with ``last`` the source moves on to the part's end."""
        self.position.at(f"inputs of {step.stacks[0].name}")
        collected, peaks = self._collect(part, step, streams, last)

        def choose(stream: Stream, found: dict[str, Statistics]) -> None:
            for stack in step.stacks:
                stats = found.pop(stack.name)
                refuse_inputs(self.name, stream.method, [(stack, stats)], peaks)
                self.position.at(f"{stream.method.name}: {stack.name}")
                stream.here.round(stack, stats)
                self.position.end()
                del stats  # large: gone before the next one's turn

        for stream, found in zip(streams, collected, strict=True):
            spread(found, stream.home, stream.crew.members)
        parts = zip(streams, collected, strict=True)
        work = [(stream.crew.members, partial(choose, stream, found)) for stream, found in parts]
        streams[0].home.ranks.own(work)

    def advance(self, stream: Stream) -> None:
        """A stream whose layer is rounded moves on to its outputs."""
        self._move(stream, self.parts[-1])

    def _move(self, stream: Stream, part: Part) -> None:
        """A stream at the beginning of ``part`` moves on to its end."""
        self._fill(self._state(stream))
        for number, batch in enumerate(stream.batches):
            stream.batches[number] = self._parted.run(part, batch).ended

    def _collect(
        self, part: Part, step: Step, streams: Sequence[Stream], last: bool
    ) -> tuple[list[dict[str, Statistics]], dict[str, Tensor]]:
        """(statistics of a step's inputs in each stream, beside the source's; the source's largest magnitudes). The
        batches and the copies of the layer are let go."""
        states = [self._state(stream) for stream in streams]
        begun = [{stack.name: self._empty(stack, stream) for stack in step.stacks} for stream in streams]
        collected = [{name: stats for name, (stats, _) in found.items()} for found in begun]
        samples = [Sample(self.tokens, stream.home) for stream in streams]
        peaks: dict[str, Tensor] = {}
        for number, batch in enumerate(self.hidden):
            self._fill(self.source)
            source = self._parted.run(part, batch, step, to_end=last)
            _raise_peaks(peaks, step, source)
            for stream, state, found, sample in zip(streams, states, begun, samples, strict=True):
                self._fill(state)
                own = stream.batches[number]
                fed = self._parted.run(part, own, step, to_end=False)
                for stack in step.stacks:
                    stats, divisor = found[stack.name]
                    if isinstance(stats, InputStatistics):
                        behind = batch - own if stack.adds else None
                        inputs = fed.inputs[stack.name], source.inputs[stack.name]
                        stats.add(*inputs, divisor, behind, self._gate(stack, fed))
                    else:
                        self._count(stack, stats, fed, source, divisor, batch - own if stack.adds else None)
                if fed.routed is not None:
                    sample.take(fed.routed)
            if last:
                self.hidden[number] = source.ended
        for state, whole, sample in zip(states, collected, samples, strict=True):
            self._fill(state)
            finish(self.module, step.stacks, whole, sample)
        self._fill(self.source)
        return collected, self._of_all_ranks(step, peaks, streams[0].home.ranks)

    def _of_all_ranks(self, step: Step, peaks: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
        """Peaks of all batches; a rank without any has none."""
        none = torch.zeros((), device=self.layer.device)
        names = [stack.name for stack in step.stacks]
        found = ranks.largest(torch.stack([peaks.get(name, none).float() for name in names]))
        return dict(zip(names, found, strict=True))

    def _gate(self, stack: Stack, fed: Fed) -> Tensor | None:
        """What a shared expert's output is multiplied by, with the gate that ``module`` has now."""
        if not stack.gate:
            return None
        assert fed.routed is not None
        return gate_of(self.module, stack.gate, fed.routed.hidden)

    def _count(
        self,
        stack: Stack,
        stats: RoutedStatistics,
        fed: Fed,
        source: Fed,
        divisor: Tensor | None,
        behind: Tensor | None,
    ) -> None:
        """Tokens as this stream routes them. The source's inputs for them are those that its experts would have: beside
        one that the source did not choose, too."""
        call, other = fed.routed, source.routed
        assert call is not None
        assert other is not None
        mixture, tokens = mixture_of(self.module), call.tokens
        x, s = call.hidden[tokens], other.hidden[tokens]
        if stack.inner:
            x = inner(mixture, mixture.gate_up_proj, x, call.counts)
            s = inner(mixture, self.source[GATE_UP], s, call.counts)
        lost = None if behind is None else call.shared_out(behind.flatten(0, -2))
        stats.add(x, call.weights, call.counts, s, divisor, lost)
        stats.agree(*call.agreement(other))

    def _empty(self, stack: Stack, stream: Stream) -> tuple[Statistics, Tensor | None]:
        """(statistics before any batch, the input's divisor), alike on all ranks."""
        known: dict[str, Tensor] = {}
        if stream.home.mine:
            given = {"through": self._through(stack, stream.here), "divisor": stream.here.divisor(stack)}
            known = {name: tensor for name, tensor in given.items() if tensor is not None}
        known = stream.home.share(known)
        through, divisor, exponent = known.get("through"), known.get("divisor"), self.settings.exponent
        if not stack.routed:
            return InputStatistics(through=through, exponent=exponent, home=stream.home), divisor
        number = len(stack.problems)
        return RoutedStatistics(number, self.settings, through=through, drifting=True, home=stream.home), divisor

    def _through(self, stack: Stack, work: LayerWork) -> Tensor | None:
        """The drift goes through the weights where that makes it smaller, or where hidden states join it."""
        if not stack.routed:
            target = work.target(stack)
            return target.to(self.dtype) if stack.adds or _wide(target) else None
        if not stack.adds and not _wide(work.target(stack.part(slice(0, 1)))):
            return None
        some = [slice(start, start + AT_ONCE) for start in range(0, len(stack.problems), AT_ONCE)]
        return torch.cat([work.target(stack.part(part)).to(self.dtype) for part in some])

    def _state(self, stream: Stream) -> dict[str, Tensor]:
        """The layer as a reader of the output gets it; what has no codes yet is the source's."""
        return told(stream.home, self._own_state(stream) if stream.home.mine else {}, stream.held)

    def _own_state(self, stream: Stream) -> dict[str, Tensor]:
        stored = stream.method.stored_dtype or self.dtype
        casts, source = self.decoder.family.casts, self.layer.tensors
        state = stream.here.state(self.dtype, stored, casts)
        for name in (name for name in state if not casts(name)):
            written = source[name].dtype  # whatever a scale made of it
            state[name] = state[name].to(written).to(torch.promote_types(self.dtype, written))
        return self.decoder.in_memory({name: tensor.to(self.layer.device) for name, tensor in state.items()})

    def _fill(self, state: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict(dict(state), assign=True)


def told(home: Home, state: Mapping[str, Tensor], held: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's ``state`` at home, on every rank; only what changed against ``held``, which all have, is sent."""
    if home.ranks.number == 1:
        return dict(state)
    held.update(home.share({name: tensor for name, tensor in state.items() if not _same(held.get(name), tensor)}))
    return dict(held)


def _same(held: Tensor | None, tensor: Tensor) -> bool:
    return held is not None and held.dtype == tensor.dtype and torch.equal(held, tensor)


def together(step: Step, streams: Sequence[Stream]) -> list[Sequence[Stream]]:
    """Which streams' statistics are collected in one pass of the source: all, but of experts one stream's at each rank,
    for each has E Gram matrices. The source's part is computed again for the next."""
    if not any(stack.routed for stack in step.stacks):
        return [streams]
    groups: list[list[Stream]] = []
    for stream in streams:  # in their order, which decides whose fault is told
        if not groups or any(stream.home.owner == other.home.owner for other in groups[-1]):
            groups.append([])
        groups[-1].append(stream)
    return [*groups]


def _wide(target: Tensor) -> bool:
    return target.shape[-2] < target.shape[-1]


def _raise_peaks(peaks: dict[str, Tensor], step: Step, fed: Fed) -> None:
    """The largest magnitudes of inputs so far. Inner ones of experts are not made in the source: the streams' count."""
    for stack in step.stacks:
        x = fed.inputs.get(stack.name)
        if x is None:
            assert fed.routed is not None
            x = fed.routed.hidden
        if not x.numel():
            continue
        low, high = x.aminmax()
        peak = torch.maximum(high, -low)
        peaks[stack.name] = torch.maximum(peak, peaks.get(stack.name, peak))
