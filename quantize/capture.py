"""What a layer is fed: forwards that record their inputs, and arguments that are recorded to call layers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtool.convert.models.feeds import Norm, Producer
from qtool.quantize.experts import Routed, Taker, Watch, mixture_of, watched
from qtool.quantize.stacks import Stack, Step

# One tensor [batch, length, hidden] for each calibration batch that lies on this rank. All ranks have as many: where
# the batches do not divide, the last is of no rows; no forward is run for it, and its inputs are of no tokens.
Hidden = list[Tensor]
Calls = dict[int, dict[int, dict[str, Any]]]  # id(layer) -> batch size -> keyword arguments


class Enough(Exception):
    """A forward may end here: all that was wanted of it is known."""


@contextmanager
def captured(
    layer: nn.Module, stacks: Sequence[Stack], take: Callable[[str, Tensor], None], watch: Watch, enough: bool = False
) -> Iterator[None]:
    """While open, ``take(name, input)`` is called for every plain stack of a forward, and ``watch`` of its mixture;
    with ``enough``, the last of them ends it by raising Enough. Experts' own inputs are seen after that."""
    plain = [stack.name for stack in stacks if not stack.routed]
    missing = set(plain)
    if any(stack.routed for stack in stacks):
        missing.add("")

    def seen(name: str) -> None:
        missing.discard(name)
        if enough and not missing:
            raise Enough

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            take(name, inputs[0])
            seen(name)

        return keep

    def routed(call: Routed) -> Taker | None:
        taker = watch(call)
        seen("")
        return taker

    with ExitStack() as hooks:
        for name in plain:
            handle = layer.get_submodule(name).register_forward_pre_hook(hook(name))
            hooks.callback(handle.remove)
        if "" in missing:
            hooks.enter_context(watched(mixture_of(layer), routed))
        yield


class Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it was called with and passes its input on. calls: of each pass of a
    forward (a looped model's has several), by batch size; begun: the first pass's hidden states; passes: so far, to be
    set to 0 before a forward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.calls: list[dict[int, dict[str, Any]]] = []
        self.begun, self.passes = torch.empty(0), 0
        # some models ask a layer for its kind before they call it
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Called by the model."""
        if self.passes == 0:
            self.begun = hidden_states
        if self.passes == len(self.calls):
            self.calls.append({})
        self.calls[self.passes][hidden_states.shape[0]] = kwargs
        self.passes += 1
        return hidden_states


@dataclass(frozen=True)
class Part:
    """Steps of a layer up to where what they made has joined the hidden states: attention, then the rest. ``silent``:
    the layer's children that earlier parts are made of; ``until``: the norm that the next part begins with, None at
    the layer's end."""

    steps: tuple[Step, ...]
    silent: tuple[str, ...] = ()
    until: str | None = None


def parts_of(steps: Sequence[Step]) -> tuple[Part, ...]:
    """A part begins at a norm in front of a child that no earlier part has: the norm's inputs are hidden states."""
    found: list[list[Step]] = []
    for step in steps:
        begun = {child_of(earlier) for part in found for earlier in part}
        if not found or (isinstance(_producer(step), Norm) and child_of(step) not in begun):
            found.append([])
        found[-1].append(step)
    parts: list[Part] = []
    silent: tuple[str, ...] = ()
    for part, following in zip(found, [*found[1:], None], strict=True):
        producer = _producer(following[0]) if following else None
        parts.append(Part(tuple(part), silent, producer.name if isinstance(producer, Norm) else None))
        silent += tuple(sorted({child_of(step) for step in part}))
    return tuple(parts)


def child_of(step: Step) -> str:
    """The layer's child that the consumers lie in, as ``self_attn``."""
    return step.stacks[0].name.split(".")[0]


def _producer(step: Step) -> Producer:
    return step.stacks[0].feeds[0].producer


@dataclass(frozen=True)
class Fed:
    """One batch in a part of a layer: the inputs of a step's plain stacks by their names, and its mixture's call; the
    hidden states at the part's end, empty where the forward did not go on to it."""

    inputs: dict[str, Tensor]
    routed: Routed | None
    ended: Tensor


def nothing(layer: nn.Module, stacks: Sequence[Stack], states: Tensor) -> Fed:
    """Of a batch without rows: inputs of no tokens."""
    plain = [stack.name for stack in stacks if not stack.routed]
    inputs = {name: states.new_zeros(0, layer.get_parameter(f"{name}.weight").shape[1]) for name in plain}
    if not any(stack.routed or stack.gate for stack in stacks):
        return Fed(inputs, None, states)
    hidden, number = states.flatten(0, -2), mixture_of(layer).num_experts
    index = torch.zeros(0, 1, dtype=torch.int64, device=states.device)
    return Fed(inputs, Routed(hidden, index, index.flatten(), states.new_zeros(0), (0,) * number), states)


class Silent(nn.Module):
    """Stands in for a child of a layer whose outputs are in the hidden states already: adds nothing to them."""

    def __init__(self, others: int | None) -> None:
        super().__init__()
        self._others = others  # outputs beside the first of a tuple; None: no tuple

    def forward(self, *inputs: Tensor, hidden_states: Tensor | None = None, **_: Any) -> Any:
        """Zeros of the input's shape."""
        zeros = torch.zeros_like(inputs[0] if hidden_states is None else hidden_states)
        return zeros if self._others is None else (zeros, *[None] * self._others)


class Parted:
    """A layer that is run a part at a time, so that no part is computed again for the feeds of a later one."""

    def __init__(self, layer: nn.Module, calls: Calls) -> None:
        self.layer, self._calls = layer, calls
        self._others: dict[str, int | None] = {}  # child -> as Silent's

    def run(self, part: Part, states: Tensor, step: Step | None = None, to_end: bool = True) -> Fed:
        """A batch of hidden states at the beginning of ``part``: the inputs of ``step``, the hidden states at the
        part's end."""
        inputs: dict[str, Tensor] = {}
        routed, ended = list[Routed](), torch.empty(0)

        def end(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            nonlocal ended
            ended = given[0]
            raise Enough

        if not len(states):
            return nothing(self.layer, step.stacks if step else (), states)
        layer, kept = self.layer, {name: self.layer.get_submodule(name) for name in part.silent}
        with ExitStack() as hooks:
            if step is not None:
                hooks.enter_context(captured(layer, step.stacks, inputs.__setitem__, routed.append, not to_end))
            if part.until is not None:
                hooks.callback(layer.get_submodule(part.until).register_forward_pre_hook(end).remove)
                for name in {child_of(one) for one in part.steps}:
                    hooks.callback(layer.get_submodule(name).register_forward_hook(self._note(name)).remove)
            for name, child in kept.items():
                setattr(layer, name, Silent(self._others[name]))
                hooks.callback(setattr, layer, name, child)
            with suppress(Enough):
                ended = run_layer(layer, states, self._calls)
        return Fed(inputs, routed[0] if routed else None, ended)

    def _note(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._others[name] = len(output) - 1 if isinstance(output, tuple) else None

        return note


def run_layer(layer: nn.Module, states: Tensor, calls: Calls) -> Tensor:
    """One batch through a layer, called as the model itself calls it."""
    if not len(states):
        return states
    output = layer(states, **calls[id(layer)][states.shape[0]])
    states = output[0] if isinstance(output, tuple) else output
    return states


def advance(layer: nn.Module, hidden: Hidden, calls: Calls) -> None:
    """All batches of a stream through a layer."""
    for number, states in enumerate(hidden):
        hidden[number] = run_layer(layer, states, calls)
