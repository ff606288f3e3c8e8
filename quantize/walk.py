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
from qtool.quantize.architectures import Architecture, InputGroup, architecture_of
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.folding import Heads, quantize_layer
from qtool.quantize.layer import LayerOutput
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
    """What the walk needs: the model's skeleton, its weights, the calibration tokens and the outputs to make.

    ``restore(name, index)`` gives back a finished layer's state dict (as its artifact holds it) when a run resumes.
    For outputs in llama.cpp's formats, ``types``: output -> linear -> ggml type; ``importance``: output -> linear ->
    mean square of its input channels, where a file said so.
    """

    model: nn.Module
    checkpoint: Checkpoint
    calibration: CalibrationSet
    outputs: Sequence[Method]
    device: torch.device
    restore: Callable[[str, int], Mapping[str, Tensor]] | None = None
    types: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    importance: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    architecture: Architecture = field(init=False)
    on_grid: list[GridMethod] = field(init=False)
    weighing: bool = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        config: Any = self.model.config
        self.architecture = architecture_of(config)
        self.on_grid = [method for method in self.outputs if isinstance(method, AwqMethod | GptqMethod)]
        self.weighing = any(isinstance(method, GgufMethod) and method.needs_importance for method in self.outputs)
        embedding = next(info for name, info in self.checkpoint.tensors.items() if "embed_tokens" in name)
        self.dtype = embedding.dtype
        if self.device.type == "cpu" and not (self.dtype == torch.bfloat16 and fast_bfloat16()):
            self.dtype = torch.float32
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv = config.num_key_value_heads
        self.heads = Heads(kv, config.num_attention_heads // kv, dim)

    @property
    def layers(self) -> nn.ModuleList:
        decoder: Any = self.model.get_submodule(self.architecture.prefix.rstrip("."))
        return decoder  # type: ignore[no-any-return]  # get_submodule is typed as Module

    @torch.inference_mode()
    def run(self, start: int = 0) -> Iterator[LayerResult]:
        """Results of layers ``start`` onward; earlier ones are replayed forward without being quantized again.

        Raises QtoolError naming the layer for NaN/Inf in weights or activations, and for activations that the dtype of
        an output cannot hold.
        """
        # outputs that need no calibration cause no forward
        calibrated = bool(self.on_grid) or self.weighing
        hidden, calls = self._record_inputs() if calibrated else ([], {})
        streams = {method.name: list(hidden) for method in self.on_grid if method.own_stream}
        with ThreadPoolExecutor(max_workers=1) as reader:  # the next layer is read while this one is worked on
            following = reader.submit(self._read, 0)
            for index in range(len(self.layers)):
                tensors = following.result()
                weights = self._place(index, tensors)
                if index + 1 < len(self.layers):
                    following = reader.submit(self._read, index + 1)
                if index < start:
                    self._replay(index, weights, hidden, streams, calls)
                    continue
                outputs, squares = self._visit(index, weights, hidden, streams, calls) if calibrated else ({}, {})
                for method in self.outputs:
                    if isinstance(method, Nf4Method):
                        outputs[method.name] = nf4.quantize_layer(method, self.architecture, tensors, self.device)
                    elif isinstance(method, GgufMethod):
                        outputs[method.name] = self._in_blocks(method, index, tensors, squares)
                yield LayerResult(index, outputs)
                del weights, tensors, outputs

    def _visit(
        self, index: int, weights: dict[str, Tensor], hidden: Hidden, streams: dict[str, Hidden], calls: Calls
    ) -> tuple[dict[str, LayerOutput], dict[str, Tensor]]:
        """Advance every stream through layer ``index``; returns the version of each output on a uniform grid, and each
        linear's mean squares of the source's inputs."""
        layer = self._fill(index, weights)
        last = index == len(self.layers) - 1
        shared, own = self._collect(layer, hidden, streams, calls, last)
        results = {}
        for number, method in enumerate(self.on_grid):
            owned = method.own_stream or not any(not other.own_stream for other in self.on_grid[number + 1 :])
            statistics = own.pop(method.name, shared)
            self._check_range(index, method, statistics, hidden)
            result = quantize_layer(method, self.architecture, weights, statistics, self.heads, owned)
            results[method.name] = result
            del statistics
            if method.own_stream and not last:
                self._fill(index, result.dequantized(self.dtype, method.spec.dtype))
                _advance(layer, streams[method.name], calls)
        layer.to("meta")
        squares: dict[str, Tensor] = {}
        for group in self.architecture.groups if self.weighing else ():
            row = shared[group.name].mean_square
            if not bool(row.isfinite().all()):
                raise QtoolError(
                    f"{self.architecture.prefix}{index}: the input of {group.linears[0]} is NaN or Inf on the "
                    "calibration text; the source model is broken."
                )
            squares |= dict.fromkeys(group.linears, row)
        return results, squares

    def _in_blocks(
        self, method: GgufMethod, index: int, tensors: Mapping[str, Tensor], squares: Mapping[str, Tensor]
    ) -> LayerOutput:
        prefix = f"{self.architecture.prefix}{index}."
        types = {linear: self.types[method.name][prefix + linear] for linear in self.architecture.linears}
        rows: Mapping[str, Tensor] = squares if method.needs_importance else {}
        given = self.importance.get(method.name)
        if given is not None:
            rows = {linear: given[prefix + linear] for linear in self.architecture.linears if prefix + linear in given}
        return gguf.quantize_layer(self.architecture, tensors, types, rows, self.device)

    def _collect(
        self, layer: nn.Module, hidden: Hidden, streams: dict[str, Hidden], calls: Calls, last: bool
    ) -> tuple[dict[str, InputStatistics], dict[str, dict[str, InputStatistics]]]:
        """Statistics of the source stream and of each own stream; ``hidden`` moves on to the layer's outputs, which
        after the last layer only the float16 range of the outputs on a grid is asked of."""
        done = last and not self.on_grid
        wants_source = any(not method.own_stream for method in self.on_grid)
        shared = {group.name: InputStatistics(channels_only=not wants_source) for group in self.architecture.groups}
        own = {name: {g.name: _of_own_stream(layer, g) for g in self.architecture.groups} for name in streams}
        for number, states in enumerate(hidden):
            inputs: dict[str, Tensor] = {}
            with suppress(_Enough), self._captured(layer, inputs.__setitem__, enough=done):
                hidden[number] = _run(layer, states, calls)
            if wants_source or self.weighing:
                for name, x in inputs.items():
                    shared[name].add(x)
            for stream, batches in streams.items():
                # every input is known before the last linears have run: their products are spared
                with suppress(_Enough), self._captured(layer, _adder(own[stream], inputs), enough=True):
                    _run(layer, batches[number], calls)
        for statistics in (shared, *own.values()):
            for stats in statistics.values():
                if stats.tokens:
                    stats.finish()
        return shared, own

    @contextmanager
    def _captured(self, layer: nn.Module, take: Callable[[str, Tensor], None], enough: bool = False) -> Iterator[None]:
        """While open, ``take(group name, input)`` is called for every distinct linear input of a forward; with
        ``enough``, the last one ends it by raising _Enough."""
        missing = {group.name for group in self.architecture.groups}

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                take(name, inputs[0])
                missing.discard(name)
                if enough and not missing:
                    raise _Enough

            return keep

        handles = [
            layer.get_submodule(group.linears[0]).register_forward_pre_hook(hook(group.name))
            for group in self.architecture.groups
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_range(
        self, index: int, method: GridMethod, statistics: Mapping[str, InputStatistics], hidden: Hidden
    ) -> None:
        prefix = f"{self.architecture.prefix}{index}"
        peaks = {f"the input of {g.linears[0]}": statistics[g.name].absmax.max() for g in self.architecture.groups}
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
        prefix = f"{self.architecture.prefix}{index}."
        tensors = {name: self.checkpoint.tensor(prefix + name) for name in self.layers[index].state_dict()}
        return (
            {name: tensor.pin_memory() for name, tensor in tensors.items()} if self.device.type == "cuda" else tensors
        )

    def _place(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = {name: tensor.to(self.device, self.dtype, non_blocking=True) for name, tensor in tensors.items()}
        added = any(group.kind == "norm_plus_one" for group in self.architecture.groups)
        refuse_unsound(weights, f"{self.checkpoint.path}: {self.architecture.prefix}{index}.", added)
        return weights

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
            self._fill(index, {key: tensor.to(self.device, self.dtype) for key, tensor in restored.items()})
            _advance(layer, states, calls)
        layer.to("meta")

    def _record_inputs(self) -> tuple[Hidden, Calls]:
        """Run the model's own forward with recorders in place of the layers: what the first layer is fed, and the other
        arguments (masks, positions, rotary tables) of every layer."""
        decoder: Any = self.model.get_submodule(self.architecture.prefix.split(".layers")[0])
        layers, norm = decoder.layers, decoder.norm
        recorders = [_Recorder(layer) for layer in layers]
        decoder.layers, decoder.norm = nn.ModuleList(recorders), nn.Identity()
        state = {}
        for name, tensor in decoder.state_dict().items():
            if not name.startswith("layers.") and tensor.is_meta:
                full = self.architecture.prefix.removesuffix("layers.") + name
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


def _of_own_stream(layer: nn.Module, group: InputGroup) -> InputStatistics:
    """Empty statistics whose drift goes through the linears' weights where that makes it smaller."""
    weights: list[Tensor] = [layer.get_parameter(f"{linear}.weight") for linear in group.linears]
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
