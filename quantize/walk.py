"""The walk: one decoder layer at a time is loaded, calibrated, quantized for every output, and let go.

A hidden-state stream is a column of the walk. The source's stream passes through source weights; an output that rounds
with compensation has its own, passing through its quantized layers, so that its statistics are of the inputs it will
see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.formats.plan import OutputPlan, walk_order
from qtool.convert.models.feeds import whole
from qtool.convert.models.shape import Decoder
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.capture import Calls, Hidden, Recorder, advance
from qtool.quantize.collecting import empty_statistics, mean_squares, source_statistics
from qtool.quantize.experts import prepare
from qtool.quantize.memory import BATCH_TOKENS
from qtool.quantize.methods.method import Inputs, Layer, LayerCodes, Method, Needs, Statistics
from qtool.quantize.precision import fast_bfloat16
from qtool.quantize.routed import ExpertSettings
from qtool.quantize.soundness import refuse_inputs, refuse_range, refuse_unsound, refuse_unsound_values
from qtool.quantize.stacks import Stack, stacks_of
from qtool.quantize.streams import Passage, Stream


@dataclass(frozen=True)
class Column:
    """An output as the walk sees it. importance: matrix -> mean square of its input channels, where a file says so;
    restore: prefix of a finished layer -> its state dict as the artifact holds it, as far as it is not the
    source's, when a run resumes."""

    method: Method
    plan: OutputPlan
    importance: Mapping[str, Tensor] | None = None
    restore: Callable[[str], Mapping[str, Tensor]] | None = None

    @property
    def own_stream(self) -> bool:
        """Whether its layers are fed what its own quantized prefix produces."""
        return self.method.needs is Needs.OWN_STREAM


@dataclass(frozen=True)
class LayerResult:
    """Layer ``index`` (None: a tensor outside the layers) as every output will store it. ``prefix``: of its names."""

    index: int | None
    prefix: str
    outputs: dict[str, LayerCodes]


@dataclass
class Walk:
    """What the walk needs: the model's skeleton, what feeds its matrices, its weights, the calibration tokens, the
    outputs to make, and how experts are calibrated."""

    model: nn.Module
    decoder: Decoder
    checkpoint: Checkpoint
    calibration: CalibrationSet
    outputs: Sequence[Column]
    device: torch.device
    experts: ExpertSettings = field(default_factory=ExpertSettings)
    on_grams: list[Column] = field(init=False)
    weighing: bool = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.on_grams = [output for output in self.outputs if output.method.needs.gram]
        self.weighing = any(output.method.needs is Needs.CHANNELS for output in self.outputs)
        if self.decoder.family.mixture is not None and (self.on_grams or self.weighing):
            prepare(self.model)
        embedding = next(info for name, info in self.checkpoint.tensors.items() if "embed_tokens" in name)
        self.dtype = embedding.dtype
        if self.device.type == "cpu" and not (self.dtype == torch.bfloat16 and fast_bfloat16()):
            self.dtype = torch.float32

    @property
    def layers(self) -> nn.ModuleList:
        layers: Any = self.model.get_submodule(self.decoder.prefix.rstrip("."))
        return layers  # type: ignore[no-any-return]  # get_submodule is typed as Module

    @torch.inference_mode()
    def outside(self) -> Iterator[LayerResult]:
        """Embeddings, final norm and head, a tensor at a time; no calibration weighs them, in no output."""
        for name in walk_order(self.checkpoint.tensors, self.decoder):
            if self.decoder.layer_of(name) is not None:
                continue
            tensors, matrix = {name: self.checkpoint.tensor(name)}, whole(name.removesuffix(".weight"))
            outputs = {}
            for output in self.outputs:
                plans = {plan.name: plan for plan in output.plan.outside if plan.name == matrix.module}
                if plans:
                    refuse_unsound_values(name, tensors[name])
                    layer = Layer(None, (), (matrix,), plans, tensors, {}, self.device)
                    outputs[output.method.name] = output.method.quantize(layer, Inputs())
                elif name in output.plan.specs:
                    outputs[output.method.name] = LayerCodes(tensors=tensors)
            yield LayerResult(None, "", outputs)

    @torch.inference_mode()
    def run(self, start: int = 0) -> Iterator[LayerResult]:
        """Results of visits ``start`` onward; earlier ones are replayed forward without being quantized again.

        Raises QtoolError naming the layer for NaN/Inf in weights or activations, and for activations that the dtype of
        an output cannot hold.
        """
        # outputs that need no calibration cause no forward
        calibrated = bool(self.on_grams) or self.weighing
        hidden, calls = self._record_inputs() if calibrated else ([], {})
        streams = {output.method.name: list(hidden) for output in self.outputs if output.own_stream}
        with ThreadPoolExecutor(max_workers=1) as reader:  # the next layer is read while this one is worked on
            visits = self.decoder.visits()
            following = reader.submit(self._read, visits[0].layer)
            for number, visit in enumerate(visits):
                index, tensors = visit.layer, following.result()
                held = self._place(index, tensors)
                if number + 1 < len(visits):
                    following = reader.submit(self._read, visits[number + 1].layer)
                if number < start:
                    self._replay(index, held, hidden, streams, calls)
                    continue
                feeds, matrices = self.decoder.feeds(index), self.decoder.matrices(index)
                layer = Layer(index, feeds, matrices, {}, tensors, self.decoder.in_files(held), self.device)
                last = number == len(visits) - 1
                results, seen = self._visit(layer, held, hidden, streams, calls, last) if calibrated else ({}, Inputs())
                for output in self.outputs:
                    if not output.method.needs.gram:
                        inputs = self._weighing(index, output, seen)
                        results[output.method.name] = output.method.quantize(self._planned(layer, output), inputs)
                ordered = {output.method.name: results[output.method.name] for output in self.outputs}
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
        module = self._fill(index, held)
        shared = self._collect(module, stacks, hidden, calls, last)
        own, results = [], {}
        for output in self.on_grams:
            if output.own_stream:
                work = output.method.begin(self._planned(layer, output), Inputs(shared))
                own.append(Stream(output.method, streams[output.method.name], work))
        seen = mean_squares(self._named(index), stacks, shared) if self.weighing else Inputs()
        sharing = [output for output in self.on_grams if not output.own_stream]
        for number, output in enumerate(sharing):
            refuse_inputs(self._named(index), output.method, [(stack, shared[stack.name]) for stack in stacks])
            owned = number == len(sharing) - 1
            results[output.method.name] = output.method.quantize(self._planned(layer, output), Inputs(shared, owned))
        del shared
        passage = Passage(
            self._named(index), layer, module, held, hidden, calls, self.dtype, self.decoder, self.experts
        )
        if own:
            passage.round(own)
        for output in self.on_grams:
            largest = torch.stack([states.abs().amax() for states in hidden]).amax()
            refuse_range(self._named(index), output.method, "its output", largest)
        for stream in own:
            results[stream.method.name] = stream.work.finish()
            if not last:
                passage.advance(stream)
        module.to("meta")
        return results, seen

    def _planned(self, layer: Layer, output: Column) -> Layer:
        """A layer with an output's plans of its matrices."""
        assert layer.index is not None
        at = self.decoder.at(layer.index)
        plans = {plan.name: plan for plan in output.plan.linears if plan.name.startswith(at)}
        return replace(layer, plans={matrix.module: plans[at + matrix.module] for matrix in layer.matrices})

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
        grams = any(not output.own_stream or output.method.asks_source for output in self.on_grams)
        if streams and not grams and not self.weighing:
            return empty_statistics(module, stacks, self.experts, channels_only=True)
        stay = streams or (last and not self.on_grams)
        return source_statistics(module, stacks, hidden, calls, self.experts, not grams, stay)

    def _named(self, index: int) -> str:
        """A layer in messages."""
        return f"{self.decoder.prefix}{index}"

    def _read(self, index: int) -> dict[str, Tensor]:
        """A layer's tensors in host memory, page-locked where they go on to an accelerator."""
        prefix = self.decoder.at(index)
        names = [name for name in self.checkpoint.tensors if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): self.checkpoint.tensor(name) for name in names}
        return (
            {name: tensor.pin_memory() for name, tensor in tensors.items()} if self.device.type == "cuda" else tensors
        )

    def _place(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The layer on the device, as transformers holds it."""
        weights = {
            name: tensor.to(self.device, self._dtype_of(name, tensor), non_blocking=True)
            for name, tensor in tensors.items()
        }
        refuse_unsound(weights, f"{self.checkpoint.path}: {self.decoder.at(index)}", self.decoder.family.norm_offset)
        return self.decoder.in_memory(weights)

    def _dtype_of(self, name: str, tensor: Tensor) -> torch.dtype:
        return self.dtype if self.decoder.family.casts(name) else tensor.dtype

    def _fill(self, index: int, state: Mapping[str, Tensor]) -> nn.Module:
        layer = self.layers[index]
        layer.load_state_dict(dict(state), assign=True)
        return layer

    def _replay(
        self, index: int, weights: dict[str, Tensor], hidden: Hidden, streams: dict[str, Hidden], calls: Calls
    ) -> None:
        layer = self._fill(index, weights)
        advance(layer, hidden, calls)
        for name, states in streams.items():
            (output,) = (output for output in self.outputs if output.method.name == name)
            assert output.restore is not None
            restored = output.restore(self.decoder.at(index))
            read = {key: t.to(self.device, self._dtype_of(key, t)) for key, t in restored.items()}
            self._fill(index, self.decoder.in_memory(self.decoder.in_files(weights) | read))
            advance(layer, states, calls)
        layer.to("meta")

    def _record_inputs(self) -> tuple[Hidden, Calls]:
        """Run the model's own forward with recorders in place of the layers: what the first layer is fed, and the other
        arguments (masks, positions, rotary tables) of every layer."""
        decoder: Any = self.model.get_submodule(self.decoder.prefix.split(".layers")[0])
        layers, norm = decoder.layers, decoder.norm
        recorders = [Recorder(layer) for layer in layers]
        decoder.layers, decoder.norm = nn.ModuleList(recorders), nn.Identity()
        state = {}
        for name, tensor in decoder.state_dict().items():
            if not name.startswith("layers.") and tensor.is_meta:
                full = self.decoder.prefix.removesuffix("layers.") + name
                state[name] = self.checkpoint.tensor(full).to(self.device, self.dtype)
        decoder.load_state_dict(state, assign=True, strict=False)
        for module in decoder.children():
            if module is not decoder.layers:
                module.to(self.device)
        size = max(1, BATCH_TOKENS[self.device.type] // self.calibration.tokens.shape[1])
        hidden: Hidden = []
        try:
            for tokens in self.calibration.batches(size):
                decoder(input_ids=tokens.to(self.device), use_cache=False)
                hidden.append(recorders[0].hidden)
        finally:
            decoder.layers, decoder.norm = layers, norm
            decoder.embed_tokens.to("meta")
        calls = {id(layer): recorder.calls for layer, recorder in zip(layers, recorders, strict=True)}
        return hidden, calls
