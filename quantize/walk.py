"""The walk: one decoder layer at a time is loaded, calibrated, quantized for every output, and let go.

A hidden-state stream is a column of the walk. The source's stream passes through source weights; an output that rounds
with compensation has its own, passing through its quantized layers, so that its statistics are of the inputs it will
see. Several ranks share the batches of every stream; each output is made by one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.formats.plan import LinearPlan, OutputPlan, walk_order
from qtool.convert.models.feeds import Feed, whole
from qtool.convert.models.shape import Decoder
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.capture import Calls, Hidden, advance
from qtool.quantize.collecting import empty_statistics, mean_squares, source_statistics, spread
from qtool.quantize.crew import Crew
from qtool.quantize.experts import prepare
from qtool.quantize.methods.method import Inputs, Layer, LayerCodes, LayerWork, Method, Needs, Statistics, members_of
from qtool.quantize.position import Position
from qtool.quantize.ranks import ALONE, Home, Ranks
from qtool.quantize.routed import ExpertSettings
from qtool.quantize.soundness import refuse_inputs, refuse_range, refuse_unsound_values
from qtool.quantize.source_model import SourceModel
from qtool.quantize.stacks import Stack, stacks_of
from qtool.quantize.streams import Passage, Stream, told


@dataclass(frozen=True)
class Column:
    """An output as the walk sees it. importance: matrix -> mean square of its input channels, where a file says so;
    restore: prefix of a finished layer -> its state dict as the artifact holds it, as far as it is not the
    source's, when a run resumes; owner: the rank that makes it (importance and restore are asked there alone)."""

    method: Method
    plan: OutputPlan
    importance: Mapping[str, Tensor] | None = None
    restore: Callable[[str], Mapping[str, Tensor]] | None = None
    owner: int = 0

    @property
    def own_stream(self) -> bool:
        """Whether its layers are fed what its own quantized prefix produces."""
        return self.method.needs is Needs.OWN_STREAM


@dataclass(frozen=True)
class LayerResult:
    """Layer ``index`` (None: a tensor outside the layers) as every output of this rank will store it. ``prefix``: of
    its names."""

    index: int | None
    prefix: str
    outputs: dict[str, LayerCodes]


@dataclass
class Walk:
    """What the walk needs: the model's skeleton, what feeds its matrices, its weights, the calibration tokens, the
    outputs to make, how experts are calibrated, who else walks along (every rank has the same outputs), and who is told
    where the walk is."""

    model: nn.Module
    decoder: Decoder
    checkpoint: Checkpoint
    calibration: CalibrationSet
    outputs: Sequence[Column]
    device: torch.device
    experts: ExpertSettings = field(default_factory=ExpertSettings)
    ranks: Ranks = ALONE
    position: Position = field(default_factory=Position)
    on_grams: list[Column] = field(init=False)
    crews: dict[str, Crew] = field(init=False)
    weighing: bool = field(init=False)
    source: SourceModel = field(init=False)

    def __post_init__(self) -> None:
        self.on_grams = [output for output in self.outputs if output.method.needs.gram]
        self.crews = self._crews()
        self.weighing = any(output.method.needs is Needs.CHANNELS for output in self.outputs)
        if self.decoder.family.mixture is not None and (self.on_grams or self.weighing):
            prepare(self.model)
        self.source = SourceModel(self.model, self.decoder, self.checkpoint, self.device, self.ranks)

    @property
    def layers(self) -> nn.ModuleList:
        """Of the skeleton."""
        return self.source.layers

    @torch.inference_mode()
    def outside(self) -> Iterator[LayerResult]:
        """Embeddings, final norm and head, a tensor at a time; no calibration weighs them, in no output."""
        for name in walk_order(self.checkpoint.tensors, self.decoder):
            if self.decoder.layer_of(name) is not None:
                continue
            tensor, outputs = self.checkpoint.tensor(name), dict[str, LayerCodes]()
            if any(self._plans_outside(output, name) for output in self.outputs):
                self.ranks.own([(0, partial(refuse_unsound_values, name, tensor))])
            self._each(partial(self._store_outside, name, tensor, outputs), self.outputs)
            yield LayerResult(None, "", outputs)

    def _plans_outside(self, output: Column, name: str) -> dict[str, LinearPlan]:
        module = name.removesuffix(".weight")
        return {plan.name: plan for plan in output.plan.outside if plan.name == module}

    def _store_outside(self, name: str, tensor: Tensor, outputs: dict[str, LayerCodes], output: Column) -> None:
        """A tensor outside the layers as an output holds it, where it does."""
        tensors = {name: tensor}
        if plans := self._plans_outside(output, name):
            layer = Layer(None, (), (whole(name.removesuffix(".weight")),), plans, tensors, {}, self.device)
            outputs[output.method.name] = output.method.quantize(layer, Inputs())
        elif name in output.plan.specs:
            outputs[output.method.name] = LayerCodes(tensors=tensors)

    @torch.inference_mode()
    def run(self, start: int = 0) -> Iterator[LayerResult]:
        """Results of layers ``start`` onward; earlier ones are replayed forward without being quantized again.

        Raises QtoolError naming the layer for NaN/Inf in weights or activations, and for activations that the dtype of
        an output cannot hold.
        """
        # outputs that need no calibration cause no forward
        calibrated = bool(self.on_grams) or self.weighing
        hidden, calls = self.source.record(self.calibration) if calibrated else ([], {})
        streams = {output.method.name: list(hidden) for output in self.outputs if output.own_stream}
        with ThreadPoolExecutor(max_workers=1) as reader:  # the next layer is read while this one is worked on
            layers = self.decoder.shape.layers
            following = reader.submit(self.source.read, 0)
            for index in range(layers):
                tensors = following.result()
                held = self.source.place(index, tensors)
                if index + 1 < layers:
                    following = reader.submit(self.source.read, index + 1)
                if index < start:
                    self._replay(index, held, hidden, streams, calls)
                    continue
                feeds, matrices = self.decoder.feeds(index), self.decoder.matrices(index)
                layer = Layer(index, feeds, matrices, {}, tensors, self.decoder.in_files(held), self.device)
                last = index == layers - 1
                self.position.enter(index, self._steps(feeds))
                results, seen = self._visit(layer, held, hidden, streams, calls, last) if calibrated else ({}, Inputs())
                self._quantize_others(layer, seen, results)
                names = [output.method.name for output in self.outputs]
                ordered = {name: results[name] for name in names if name in results}
                yield LayerResult(index, self.decoder.at(index), ordered)
                del layer, held, tensors, results, ordered

    def _visit(
        self,
        layer: Layer,
        held: Mapping[str, Tensor],
        hidden: Hidden,
        streams: dict[str, Hidden],
        calls: Calls,
        last: bool,
    ) -> tuple[dict[str, LayerCodes], Inputs]:
        """Advance every stream through a layer, whose tensors in memory are ``held``; returns the version of each
        output that takes Gram matrices, and each matrix's mean squares of the source's inputs."""
        index, stacks = layer.index, stacks_of(layer.feeds)
        assert index is not None
        module = self.source.fill(index, held)
        shared = self._collect(module, stacks, hidden, calls, last)
        works: dict[str, LayerWork] = {}
        results: dict[str, LayerCodes] = {}

        def begin(output: Column) -> None:
            inputs = Inputs(shared, crew=self.crews[output.method.name])
            works[output.method.name] = output.method.begin(self._planned(layer, output), inputs)

        streaming = [output for output in self.on_grams if output.own_stream]
        self._with_crews(begin, streaming)
        own = [
            Stream(output.method, streams[output.method.name], Home(self.ranks, output.owner),
                   self.crews[output.method.name], works.get(output.method.name), dict(held)) for output in streaming
        ]  # fmt: skip
        seen = self._seen(index, stacks, shared)
        sharing = [output for output in self.on_grams if not output.own_stream]
        last_here = [output for output in sharing if self.crews[output.method.name].here][-1:]

        def quantize(output: Column) -> None:
            self.position.at(output.method.name)
            refuse_inputs(self._named(index), output.method, [(stack, shared[stack.name]) for stack in stacks])
            inputs = Inputs(shared, output in last_here, self.crews[output.method.name])
            codes = output.method.quantize(self._planned(layer, output), inputs)
            if output.owner == self.ranks.rank:
                results[output.method.name] = codes
            self.position.end()

        self._with_crews(quantize, sharing)
        shared.clear()
        passage = Passage(
            self._named(index), layer, module, held, hidden, calls, self.source.dtype, self.decoder, self.experts,
            self.calibration.tokens.numel(), self.position,
        )  # fmt: skip
        if own:
            passage.round(own)
        self._refuse_outputs(index, hidden)
        for stream in own:
            if stream.home.mine:
                results[stream.method.name] = stream.here.finish()
            if not last:
                passage.advance(stream)
        module.to("meta")
        return results, seen

    def _steps(self, feeds: Sequence[Feed]) -> int:
        """Of a layer on this rank."""
        rank, stacks = self.ranks.rank, len(stacks_of(feeds))
        mine = [one for one in self.outputs if one.owner == rank or self.crews[one.method.name].here]
        return sum(stacks if output.own_stream else 1 for output in mine)

    def _each(self, work: Callable[[Column], None], outputs: Sequence[Column]) -> None:
        """Every output's work, at its owner; a fault is raised on all ranks."""
        self.ranks.own([(output.owner, partial(work, output)) for output in outputs])

    def _with_crews(self, work: Callable[[Column], None], outputs: Sequence[Column]) -> None:
        """The same, at all who round them together."""
        self.ranks.own([(self.crews[output.method.name].members, partial(work, output)) for output in outputs])

    def _crews(self) -> dict[str, Crew]:
        """Of every output; it is asked for of those that round on Gram matrices."""
        members = members_of([output.method for output in self.outputs], [one.owner for one in self.outputs],
                             self.ranks.number)  # fmt: skip
        return {one.method.name: Crew.of(self.ranks, crew) for one, crew in zip(self.outputs, members, strict=True)}

    def _seen(self, index: int, stacks: Sequence[Stack], shared: Mapping[str, Statistics]) -> Inputs:
        """Each matrix's mean squares, on the ranks that weigh by them."""
        found = [Inputs()]

        def ask() -> None:
            found[0] = mean_squares(self._named(index), stacks, shared)

        owners = dict.fromkeys(output.owner for output in self.outputs if output.method.needs is Needs.CHANNELS)
        self.ranks.own([(owner, ask) for owner in owners])
        return found[0]

    def _quantize_others(self, layer: Layer, seen: Inputs, results: dict[str, LayerCodes]) -> None:
        """The versions of outputs that take no Gram matrices."""
        index = layer.index
        assert index is not None

        def quantize(output: Column) -> None:
            self.position.at(output.method.name)
            inputs = self._weighing(index, output, seen)
            results[output.method.name] = output.method.quantize(self._planned(layer, output), inputs)
            self.position.end()

        self._each(quantize, [output for output in self.outputs if not output.method.needs.gram])

    def _refuse_outputs(self, index: int, hidden: Hidden) -> None:
        """Refuse what a layer makes of the source's stream, where an output cannot hold it."""
        if not self.on_grams:
            return
        peaks = [states.abs().amax() for states in hidden if len(states)] or [torch.zeros((), device=self.device)]
        largest = self.ranks.largest(torch.stack(peaks).amax().float())

        def refuse() -> None:
            for output in self.on_grams:
                refuse_range(self._named(index), output.method, "its output", largest)

        self.ranks.own([(0, refuse)])

    def _planned(self, layer: Layer, output: Column) -> Layer:
        """A layer with an output's plans of its matrices, those that it leaves in 16 bits not among them."""
        assert layer.index is not None
        at = self.decoder.at(layer.index)
        plans = {plan.name: plan for plan in output.plan.linears if plan.name.startswith(at)}
        planned = tuple(matrix for matrix in layer.matrices if at + matrix.module in plans)
        return replace(layer, matrices=planned, plans={one.module: plans[at + one.module] for one in planned})

    def _weighing(self, index: int, output: Column, seen: Inputs) -> Inputs:
        """Mean squares: those that a file says, those of the text where the method needs them, or none."""
        given, at = output.importance, self.decoder.at(index)
        if given is None:
            return seen if output.method.needs is Needs.CHANNELS else Inputs()
        rows = {name.removeprefix(at): row for name, row in given.items() if name.startswith(at)}
        return Inputs(importance=rows)

    def _collect(
        self, module: nn.Module, stacks: Sequence[Stack], hidden: Hidden, calls: Calls, last: bool
    ) -> dict[str, Statistics]:
        """Statistics of the source's stream, as far as any output asks for them. ``hidden`` moves on to the layer's
        outputs, unless streams of outputs are still to be held against it; after the last layer only the float16 range
        of outputs that take Gram matrices asks for it."""
        streams = any(output.own_stream for output in self.on_grams)
        grams = [output for output in self.on_grams if not output.own_stream or output.method.asks_source]
        takers = [output.owner for output in self.outputs if output.method.needs is Needs.CHANNELS]
        crews = [rank for output in grams for rank in self.crews[output.method.name].members]
        takers = list(dict.fromkeys(crews + takers))
        home = Home(self.ranks, takers[0] if takers else 0)
        if streams and not grams and not self.weighing:
            return empty_statistics(module, stacks, self.experts, channels_only=True)
        stay, tokens = streams or (last and not self.on_grams), self.calibration.tokens.numel()
        shared = source_statistics(module, stacks, hidden, calls, self.experts, not grams, stay, tokens, home)
        spread(shared, home, takers)
        return shared

    def _named(self, index: int) -> str:
        """A layer in messages."""
        return f"{self.decoder.prefix}{index}"

    def _replay(
        self, index: int, weights: dict[str, Tensor], hidden: Hidden, streams: dict[str, Hidden], calls: Calls
    ) -> None:
        layer = self.source.fill(index, weights)
        advance(layer, hidden, calls)
        for name, states in streams.items():
            (output,) = (output for output in self.outputs if output.method.name == name)
            read: dict[str, Tensor] = {}
            self._each(partial(self._restore, index, weights, read), [output])
            self.source.fill(index, told(Home(self.ranks, output.owner), read, dict(weights)))
            advance(layer, states, calls)
        layer.to("meta")

    def _restore(self, index: int, weights: dict[str, Tensor], read: dict[str, Tensor], output: Column) -> None:
        """A finished layer as its artifact holds it, into ``read``."""
        assert output.restore is not None
        restored = output.restore(self.decoder.at(index))
        found = {key: t.to(self.device, self.source.dtype_of(key, t)) for key, t in restored.items()}
        read.update(self.decoder.in_memory(self.decoder.in_files(weights) | found))
