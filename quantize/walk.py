"""The walk: one decoder layer at a time is loaded, calibrated, quantized for every output, and let go.

A hidden-state stream is a column of the walk. The source's stream passes through source weights; an output that rounds
with compensation has its own, passing through its quantized layers, so that its statistics are of the inputs it will
see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.models.feeds import Feed, Visit
from qtool.convert.models.shape import Decoder
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.folding import LayerOutput, quantize_layer
from qtool.quantize.memory import BATCH_TOKENS
from qtool.quantize.methods import gguf, nf4
from qtool.quantize.methods.sections import AwqMethod, GgufMethod, GptqMethod, GridMethod, Method, Nf4Method
from qtool.quantize.precision import fast_bfloat16
from qtool.quantize.soundness import refuse_unsound
from qtool.quantize.statistics import InputStatistics

FLOAT16_MAX = 65504.0

Hidden = list[Tensor]  # one tensor [batch, length, hidden] for each calibration batch
Calls = dict[int, dict[int, dict[str, Any]]]  # id(layer) -> batch size -> keyword arguments


@dataclass(frozen=True)
class LayerResult:
    """Layer ``index`` as every output will store it."""

    index: int
    outputs: dict[str, LayerOutput]


@dataclass
class Walk:
    """What the walk needs: the model's skeleton, what feeds its matrices, its weights, the calibration tokens and the
    outputs to make.

    ``restore(name, index)`` gives back a finished layer's state dict (as its artifact holds it) when a run resumes.
    For outputs in llama.cpp's formats, ``types``: output -> linear -> ggml type; ``importance``: output -> linear ->
    mean square of its input channels, where a file said so.
    """

    model: nn.Module
    decoder: Decoder
    checkpoint: Checkpoint
    calibration: CalibrationSet
    outputs: Sequence[Method]
    device: torch.device
    restore: Callable[[str, int], Mapping[str, Tensor]] | None = None
    types: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    importance: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    on_grid: list[GridMethod] = field(init=False)
    weighing: bool = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.on_grid = [method for method in self.outputs if isinstance(method, AwqMethod | GptqMethod)]
        self.weighing = any(isinstance(method, GgufMethod) and method.needs_importance for method in self.outputs)
        embedding = next(info for name, info in self.checkpoint.tensors.items() if "embed_tokens" in name)
        self.dtype = embedding.dtype
        if self.device.type == "cpu" and not (self.dtype == torch.bfloat16 and fast_bfloat16()):
            self.dtype = torch.float32

    @property
    def layers(self) -> nn.ModuleList:
        layers: Any = self.model.get_submodule(self.decoder.prefix.rstrip("."))
        return layers  # type: ignore[no-any-return]  # get_submodule is typed as Module

    @torch.inference_mode()
    def run(self, start: int = 0) -> Iterator[LayerResult]:
        """Results of visits ``start`` onward; earlier ones are replayed forward without being quantized again.

        Raises QtoolError naming the layer for NaN/Inf in weights or activations, and for activations that the dtype of
        an output cannot hold.
        """
        # outputs that need no calibration cause no forward
        calibrated = bool(self.on_grid) or self.weighing
        hidden, calls = self._record_inputs() if calibrated else ([], {})
        streams = {method.name: list(hidden) for method in self.on_grid if method.own_stream}
        with ThreadPoolExecutor(max_workers=1) as reader:  # the next layer is read while this one is worked on
            visits = self.decoder.visits()
            following = reader.submit(self._read, visits[0].layer)
            for number, visit in enumerate(visits):
                index, tensors = visit.layer, following.result()
                weights = self._place(index, tensors)
                if number + 1 < len(visits):
                    following = reader.submit(self._read, visits[number + 1].layer)
                if number < start:
                    self._replay(index, weights, hidden, streams, calls)
                    continue
                outputs, squares = self._visit(visit, weights, hidden, streams, calls) if calibrated else ({}, {})
                for method in self.outputs:
                    if isinstance(method, Nf4Method):
                        matrices = self.decoder.matrices(index)
                        outputs[method.name] = nf4.quantize_layer(method, matrices, tensors, self.device)
                    elif isinstance(method, GgufMethod):
                        outputs[method.name] = self._in_blocks(method, index, tensors, squares)
                yield LayerResult(index, outputs)
                del weights, tensors, outputs

    def _visit(
        self, visit: Visit, weights: dict[str, Tensor], hidden: Hidden, streams: dict[str, Hidden], calls: Calls
    ) -> tuple[dict[str, LayerOutput], dict[str, Tensor]]:
        """Advance every stream through a layer; returns the version of each output on a uniform grid, and each
        linear's mean squares of the source's inputs."""
        index, feeds = visit.layer, self.decoder.feeds(visit.layer)
        layer = self._fill(index, weights)
        last = visit == self.decoder.visits()[-1]
        shared, own = self._collect(layer, feeds, hidden, streams, calls, last)
        results = {}
        for number, method in enumerate(self.on_grid):
            owned = method.own_stream or not any(not other.own_stream for other in self.on_grid[number + 1 :])
            statistics = own.pop(method.name, shared)
            self._check_range(index, method, statistics, hidden)
            result = quantize_layer(method, feeds, weights, statistics, owned)
            results[method.name] = result
            del statistics
            if method.own_stream and not last:
                self._fill(index, result.dequantized(self.dtype, method.spec.dtype, self.decoder.family.casts))
                _advance(layer, streams[method.name], calls)
        layer.to("meta")
        squares: dict[str, Tensor] = {}
        for feed in feeds if self.weighing else ():
            row = shared[feed.name].mean_square
            if not bool(row.isfinite().all()):
                raise QtoolError(
                    f"{self.decoder.prefix}{index}: the input of {feed.name} is NaN or Inf on the calibration text; "
                    "the source model is broken."
                )
            squares |= dict.fromkeys((matrix.module for matrix in feed.consumers), row)
        return results, squares

    def _in_blocks(
        self, method: GgufMethod, index: int, tensors: Mapping[str, Tensor], squares: Mapping[str, Tensor]
    ) -> LayerOutput:
        prefix, matrices = self.decoder.at(index), self.decoder.matrices(index)
        types = {matrix.module: self.types[method.name][prefix + matrix.module] for matrix in matrices}
        rows: Mapping[str, Tensor] = squares if method.needs_importance else {}
        given = self.importance.get(method.name)
        if given is not None:
            rows = {module: given[prefix + module] for module in types if prefix + module in given}
        return gguf.quantize_layer(matrices, tensors, types, rows, self.device)

    def _collect(
        self,
        layer: nn.Module,
        feeds: Sequence[Feed],
        hidden: Hidden,
        streams: dict[str, Hidden],
        calls: Calls,
        last: bool,
    ) -> tuple[dict[str, InputStatistics], dict[str, dict[str, InputStatistics]]]:
        """Statistics of the source stream and of each own stream; ``hidden`` moves on to the layer's outputs, which
        after the last layer only the float16 range of the outputs on a grid is asked of."""
        done = last and not self.on_grid
        wants_source = any(not method.own_stream for method in self.on_grid)
        shared = {feed.name: InputStatistics(channels_only=not wants_source) for feed in feeds}
        own = {name: {feed.name: _of_own_stream(layer, feed) for feed in feeds} for name in streams}
        for number, states in enumerate(hidden):
            inputs: dict[str, Tensor] = {}
            with suppress(_Enough), _captured(layer, feeds, inputs.__setitem__, enough=done):
                hidden[number] = _run(layer, states, calls)
            if wants_source or self.weighing:
                for name, x in inputs.items():
                    shared[name].add(x)
            for stream, batches in streams.items():
                # every input is known before the last linears have run: their products are spared
                with suppress(_Enough), _captured(layer, feeds, _adder(own[stream], inputs), enough=True):
                    _run(layer, batches[number], calls)
        for statistics in (shared, *own.values()):
            for stats in statistics.values():
                if stats.tokens:
                    stats.finish()
        return shared, own

    def _check_range(
        self, index: int, method: GridMethod, statistics: Mapping[str, InputStatistics], hidden: Hidden
    ) -> None:
        prefix = f"{self.decoder.prefix}{index}"
        peaks = {f"the input of {name}": stats.absmax.max() for name, stats in statistics.items()}
        peaks["its output"] = torch.stack([states.abs().amax() for states in hidden]).amax()
        values = torch.stack([peak.float() for peak in peaks.values()]).tolist()
        for (what, _), value in zip(peaks.items(), values, strict=True):
            if not value < float("inf"):
                raise QtoolError(f"{prefix}: {what} is NaN or Inf on the calibration text; the source model is broken.")
            if method.dtype == "float16" and value > FLOAT16_MAX:
                raise QtoolError(
                    f"{prefix}: {what} reaches {value:.0f}, more than float16 holds (65504); served in float16 this "
                    f"model would print '!!!'. Set `dtype: bfloat16` for output {method.name!r}."
                )

    def _read(self, index: int) -> dict[str, Tensor]:
        """A layer's tensors in host memory, page-locked where they go on to an accelerator."""
        prefix = self.decoder.at(index)
        tensors = {name: self.checkpoint.tensor(prefix + name) for name in self.layers[index].state_dict()}
        return (
            {name: tensor.pin_memory() for name, tensor in tensors.items()} if self.device.type == "cuda" else tensors
        )

    def _place(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = {
            name: tensor.to(self.device, self._dtype_of(name, tensor), non_blocking=True)
            for name, tensor in tensors.items()
        }
        refuse_unsound(weights, f"{self.checkpoint.path}: {self.decoder.at(index)}", self.decoder.family.norm_offset)
        return weights

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
        _advance(layer, hidden, calls)
        for name, states in streams.items():
            assert self.restore is not None
            restored = self.restore(name, index)
            self._fill(index, {key: t.to(self.device, self._dtype_of(key, t)) for key, t in restored.items()})
            _advance(layer, states, calls)
        layer.to("meta")

    def _record_inputs(self) -> tuple[Hidden, Calls]:
        """Run the model's own forward with recorders in place of the layers: what the first layer is fed, and the other
        arguments (masks, positions, rotary tables) of every layer."""
        decoder: Any = self.model.get_submodule(self.decoder.prefix.split(".layers")[0])
        layers, norm = decoder.layers, decoder.norm
        recorders = [_Recorder(layer) for layer in layers]
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


class _Enough(Exception):
    """A forward may end here: all that was wanted of it is known."""


@contextmanager
def _captured(
    layer: nn.Module, feeds: Sequence[Feed], take: Callable[[str, Tensor], None], enough: bool = False
) -> Iterator[None]:
    """While open, ``take(feed's name, input)`` is called for every distinct input of a forward; with ``enough``, the
    last one ends it by raising _Enough."""
    missing = {feed.name for feed in feeds}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            take(name, inputs[0])
            missing.discard(name)
            if enough and not missing:
                raise _Enough

        return keep

    handles = [layer.get_submodule(feed.name).register_forward_pre_hook(hook(feed.name)) for feed in feeds]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it was called with and passes its input on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.calls: dict[int, dict[str, Any]] = {}
        self.hidden = torch.empty(0)
        # some models ask a layer for its kind before they call it
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.hidden = hidden_states
        self.calls[hidden_states.shape[0]] = kwargs
        return hidden_states


def _of_own_stream(layer: nn.Module, feed: Feed) -> InputStatistics:
    """Empty statistics whose drift goes through the matrices where that makes it smaller."""
    weights: list[Tensor] = [matrix.of(layer.get_parameter(matrix.tensor)) for matrix in feed.consumers]
    rows, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    return InputStatistics(through=torch.cat(weights) if rows < columns else None)


def _adder(into: Mapping[str, InputStatistics], source: Mapping[str, Tensor]) -> Callable[[str, Tensor], None]:
    return lambda name, x: into[name].add(x, source[name])


def _run(layer: nn.Module, states: Tensor, calls: Calls) -> Tensor:
    output = layer(states, **calls[id(layer)][states.shape[0]])
    states = output[0] if isinstance(output, tuple) else output
    return states


def _advance(layer: nn.Module, hidden: Hidden, calls: Calls) -> None:
    for number, states in enumerate(hidden):
        hidden[number] = _run(layer, states, calls)
