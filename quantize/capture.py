"""What a layer is fed: forwards that record their inputs, and arguments that are recorded to call layers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtool.quantize.experts import Routed, Taker, Watch, mixture_of, watched
from qtool.quantize.stacks import Stack, Step

Hidden = list[Tensor]  # one tensor [batch, length, hidden] for each calibration batch
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
        """Called by the model."""
        self.hidden = hidden_states
        self.calls[hidden_states.shape[0]] = kwargs
        return hidden_states


@dataclass(frozen=True)
class Fed:
    """One batch on its way through a layer: the inputs of a step's plain stacks by their names, and its mixture's call;
    the hidden states that the consumers' output is added to, where it is; the layer's output, where the forward went on
    to its end."""

    inputs: dict[str, Tensor]
    routed: Routed | None
    hidden: Tensor | None
    output: Tensor | None


def feed_through(
    layer: nn.Module, step: Step, before: Sequence[str], states: Tensor, calls: Calls, to_end: bool = False
) -> Fed:
    """A batch as far as the inputs of ``step``, or ``to_end``. ``before``: modules whose outputs were added to the
    hidden states on the way."""
    inputs: dict[str, Tensor] = {}
    added, routed, output = [states], list[Routed](), None
    adds = any(stack.adds for stack in step.stacks)
    with ExitStack() as hooks:
        for name in before if adds else ():
            hook = layer.get_submodule(name).register_forward_hook(lambda _m, _i, output: added.append(output))
            hooks.callback(hook.remove)
        hooks.enter_context(captured(layer, step.stacks, inputs.__setitem__, routed.append, not to_end))
        with suppress(Enough):
            output = run_layer(layer, states, calls)
    return Fed(inputs, routed[0] if routed else None, sum(added[1:], added[0]) if adds else None, output)


def run_layer(layer: nn.Module, states: Tensor, calls: Calls) -> Tensor:
    """One batch through a layer, called as the model itself calls it."""
    output = layer(states, **calls[id(layer)][states.shape[0]])
    states = output[0] if isinstance(output, tuple) else output
    return states


def advance(layer: nn.Module, hidden: Hidden, calls: Calls) -> None:
    """All batches of a stream through a layer."""
    for number, states in enumerate(hidden):
        hidden[number] = run_layer(layer, states, calls)
