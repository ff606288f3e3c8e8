"""What a layer is fed: forwards that record their inputs, and arguments that are recorded to call layers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtool.convert.models.feeds import Feed

Hidden = list[Tensor]  # one tensor [batch, length, hidden] for each calibration batch
Calls = dict[int, dict[int, dict[str, Any]]]  # id(layer) -> batch size -> keyword arguments


class Enough(Exception):
    """A forward may end here: all that was wanted of it is known."""


@contextmanager
def captured(
    layer: nn.Module, feeds: Sequence[Feed], take: Callable[[str, Tensor], None], enough: bool = False
) -> Iterator[None]:
    """While open, ``take(feed's name, input)`` is called for every distinct input of a forward; with ``enough``, the
    last one ends it by raising Enough."""
    missing = {feed.name for feed in feeds}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            take(name, inputs[0])
            missing.discard(name)
            if enough and not missing:
                raise Enough

        return keep

    handles = [layer.get_submodule(feed.name).register_forward_pre_hook(hook(feed.name)) for feed in feeds]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    """One batch on its way through a layer: the input of a feed; the hidden states that its consumer's output is added
    to, where it is; the layer's output, where the forward went on to its end."""

    inputs: Tensor
    hidden: Tensor | None
    output: Tensor | None


def feed_through(
    layer: nn.Module, feed: Feed, before: Sequence[str], states: Tensor, calls: Calls, to_end: bool = False
) -> Fed:
    """A batch as far as the input of ``feed``, or ``to_end``. ``before``: modules whose outputs were added to the
    hidden states on the way."""
    added, seen = [states], []

    def take(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        if not to_end:
            raise Enough

    handles = [layer.get_submodule(feed.name).register_forward_pre_hook(take)]
    if feed.adds:
        for name in before:
            hook = layer.get_submodule(name).register_forward_hook(lambda _m, _i, output: added.append(output))
            handles.append(hook)
    output = None
    try:
        with suppress(Enough):
            output = run_layer(layer, states, calls)
    finally:
        for handle in handles:
            handle.remove()
    return Fed(seen[0], sum(added[1:], added[0]) if feed.adds else None, output)


def run_layer(layer: nn.Module, states: Tensor, calls: Calls) -> Tensor:
    """One batch through a layer, called as the model itself calls it."""
    output = layer(states, **calls[id(layer)][states.shape[0]])
    states = output[0] if isinstance(output, tuple) else output
    return states


def advance(layer: nn.Module, hidden: Hidden, calls: Calls) -> None:
    """All batches of a stream through a layer."""
    for number, states in enumerate(hidden):
        hidden[number] = run_layer(layer, states, calls)
