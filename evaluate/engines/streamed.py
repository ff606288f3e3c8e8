"""A model larger than the memory here: its layers are read one at a time, for all windows of a text together.

What a text costs is then a read of the weights and a layer's memory, whatever the model's size; experts are dequantized
one by one into their layer, by qtool's own readers, for transformers reads no quantized experts. Such a model gives
log-probabilities. It answers nothing: each token of an answer would read all weights again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qtool import QtoolError
from qtool.convert.files.checkpoint import TensorStream
from qtool.convert.models.table import find_family
from qtool.convert.skeleton import build_skeleton, expected_shapes
from qtool.evaluate.engines import machine
from qtool.evaluate.engines.engine import CHUNK, Batch, Completion, Decoding, Loaded, Reading, Request
from qtool.evaluate.engines.torch_model import compute_dtype, dtype_of, fill, in_model_names

SHARE = 0.9  # of the memory that is free
MOST_TOKENS = 2**15  # of one sweep: their hidden states, and one layer's work on them, are in memory at once


@dataclass(frozen=True)
class StreamedModel(Loaded):
    """``model``: its skeleton, with everything but the layers. ``stream(prefix)``: tensors whose names begin so."""

    model: nn.Module
    config: Any
    prefix: str
    stream: Callable[[str], TensorStream]
    where: torch.device
    hidden: dict[bytes, Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Of the activations."""
        return str(compute_dtype(self.where)).removeprefix("torch.")

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return self.where.type

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[Completion]:
        """Raises QtoolError: see above."""
        raise QtoolError(_ANSWERS, exit_code=3)

    def time(self, batch: Batch) -> Reading:
        """Raises QtoolError: see above."""
        raise QtoolError(_ANSWERS, exit_code=3)

    @torch.inference_mode()
    def prepare(self, windows: Tensor) -> None:
        """Take ``windows`` int64 ``[n, length]`` through all layers, in as few sweeps as memory allows."""
        if all(_key(window) in self.hidden for window in windows):
            return
        self.hidden.clear()
        with self._layers_on_demand():
            for part in windows.split(max(1, MOST_TOKENS // windows.shape[1])):
                states = self.body(input_ids=part.to(self.where), use_cache=False).last_hidden_state
                self.hidden.update(zip(map(_key, part), states.cpu(), strict=True))

    @torch.inference_mode()
    def logits(self, window: Tensor) -> Iterator[Tensor]:
        """The head on what `prepare` kept, chunk by chunk; a window that it was not told of takes a sweep."""
        self.prepare(window.unsqueeze(0)) if _key(window) not in self.hidden else None
        for part in self.hidden[_key(window)].split(CHUNK):
            yield self.head(part)

    def head(self, states: Tensor) -> Tensor:
        """Logits ``[n, vocabulary]`` of last hidden states ``[n, hidden]``, by the model's own code behind its body."""
        base, body = str(getattr(self.model, "base_model_prefix", "model")), self.body
        setattr(self.model, base, _Done(states.unsqueeze(0).to(self.where)))
        try:
            token = torch.zeros(1, 1, dtype=torch.int64, device=self.where)
            logits: Tensor = self.model(input_ids=token, use_cache=False).logits[0]
        finally:
            setattr(self.model, base, body)
        return logits

    @property
    def layers(self) -> Any:
        """Of the skeleton: empty, but for one that is at work."""
        return self.model.get_submodule(self.prefix.rstrip("."))

    def fill(self, number: int) -> nn.Module:
        """Read a layer's tensors into it. Raises QtoolError naming one that the model lacks."""
        layer: nn.Module = self.layers[number]
        at = f"{self.prefix}{number}."
        state = {name.removeprefix(at): tensor for name, tensor in _tensors(self, at)}
        missing = sorted(set(layer.state_dict()) - set(state))
        if missing:
            raise QtoolError(f"the model lacks {at}{missing[0]} ({len(missing)} tensors missing).")
        layer.load_state_dict(state, strict=False, assign=True)
        return layer

    @property
    def body(self) -> Any:
        """Embeddings, layers and the last norm."""
        return getattr(self.model, str(getattr(self.model, "base_model_prefix", "model")))

    @property
    def last_norm(self) -> Any:
        """Behind the last layer."""
        family = find_family({"architectures": self.config.architectures})
        return getattr(self.body, family.final_norm if family else "norm")

    @contextmanager
    def _layers_on_demand(self) -> Iterator[None]:
        """A layer is filled before its forward and empty after it."""

        def fill(number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def before(_: nn.Module, __: tuple[Any, ...]) -> None:
                self.fill(number)

            return before

        def empty(layer: nn.Module, _: object, __: object) -> None:
            layer.to("meta")

        hooks = [layer.register_forward_pre_hook(fill(number)) for number, layer in enumerate(self.layers)]
        hooks += [layer.register_forward_hook(empty) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Done(nn.Module):
    """Stands in for a model's body: its last hidden states are known."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: Any, **__: Any) -> SimpleNamespace:
        """What the head's code asks of a body's output."""
        return SimpleNamespace(
            last_hidden_state=self.states, past_key_values=None, hidden_states=None, attentions=None, router_logits=None
        )


_ANSWERS = (
    "this model does not fit into memory, so engine reference reads it layer by layer and gives log-probabilities "
    "alone (`evaluate: text:`). For answers to tasks take an engine that serves it: vllm, llama.cpp or openai."
)


def _key(window: Tensor) -> bytes:
    return window.contiguous().numpy().tobytes()


def _tensors(model: StreamedModel, prefix: str) -> TensorStream:
    shapes, _ = expected_shapes(model.model)
    dtype, family = compute_dtype(model.where), find_family({"architectures": model.config.architectures})
    placed = (
        (name, tensor.to(model.where, dtype_of(family, name, tensor, dtype))) for name, tensor in model.stream(prefix)
    )
    yield from in_model_names(placed, model.config, shapes)


def fits(config: Any, device: torch.device, trust_remote_code: bool = False) -> bool:
    """Whether a model's weights, as they are computed with, leave room beside them."""
    free = machine.free_memory(str(device))
    shapes, tied = expected_shapes(build_skeleton(config, trust_remote_code))
    numbers = sum(math.prod(shape) for name, shape in shapes.items() if name not in tied)
    return free is None or numbers * compute_dtype(device).itemsize < SHARE * free


def open_streamed(
    facts: Any, stream: Callable[[str], TensorStream], config: Any, device: torch.device, trust_remote_code: bool
) -> StreamedModel:
    """The model without its layers, which come when they are needed. Raises QtoolError for one that is of no known
    family: nobody knows where its layers are."""
    family = find_family({"architectures": config.architectures})
    if family is None:
        raise QtoolError(
            f"{', '.join(config.architectures or [])} cannot be read layer by layer: it is of no known family, and "
            "nobody knows where its layers are."
        )
    model = build_skeleton(config, trust_remote_code)
    streamed = StreamedModel(facts, model, config, family.prefix, stream, device)
    shapes, tied = expected_shapes(model)
    outside = {name for name in shapes if not name.startswith(family.prefix)}
    wanted = sorted(outside - tied)
    found = (pair for name in wanted for pair in stream(name))
    state = {name: tensor.to(device, compute_dtype(device)) for name, tensor in found if name in outside}
    fill(model, state, set(wanted), bool(tied))
    for name, buffer in model.named_buffers():
        if not name.startswith(family.prefix):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, buffer.to(device))
    return streamed
