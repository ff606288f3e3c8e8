"""What a layer is fed: forwards that record their inputs, and arguments that are recorded to call layers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtool.convert.models.feeds import Feed, Norm

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
class Part:
    """Feeds of a layer up to where what they made has joined the hidden states: attention, then the rest. ``silent``:
    the layer's children that earlier parts are made of; ``until``: the norm that the next part begins with, None at
    the layer's end."""

    feeds: tuple[Feed, ...]
    silent: tuple[str, ...] = ()
    until: str | None = None


def parts_of(feeds: Sequence[Feed]) -> tuple[Part, ...]:
    """A part begins at a norm in front of a child that no earlier part has: the norm's inputs are hidden states."""
    found: list[list[Feed]] = []
    for feed in feeds:
        begun = {child_of(earlier) for part in found for earlier in part}
        if not found or (isinstance(feed.producer, Norm) and child_of(feed) not in begun):
            found.append([])
        found[-1].append(feed)
    parts: list[Part] = []
    silent: tuple[str, ...] = ()
    for part, following in zip(found, [*found[1:], None], strict=True):
        producer = following[0].producer if following else None
        parts.append(Part(tuple(part), silent, producer.name if isinstance(producer, Norm) else None))
        silent += tuple(sorted({child_of(feed) for feed in part}))
    return tuple(parts)


def child_of(feed: Feed) -> str:
    """The layer's child that the consumers lie in, as ``self_attn``."""
    return feed.name.split(".")[0]


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

    def run(self, part: Part, states: Tensor, feed: Feed | None = None, to_end: bool = True) -> tuple[Tensor, Tensor]:
        """A batch of hidden states at the beginning of ``part`` -> (the input of ``feed``, the hidden states at the
        part's end); what is not asked for is empty."""
        seen = ended = torch.empty(0)

        def take(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal seen
            seen = inputs[0]
            if not to_end:
                raise Enough

        def end(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal ended
            ended = inputs[0]
            raise Enough

        layer, kept = self.layer, {name: self.layer.get_submodule(name) for name in part.silent}
        handles = [] if feed is None else [layer.get_submodule(feed.name).register_forward_pre_hook(take)]
        if part.until is not None:
            handles.append(layer.get_submodule(part.until).register_forward_pre_hook(end))
            handles += [layer.get_submodule(name).register_forward_hook(self._note(name)) for name in _children(part)]
        try:
            for name in part.silent:
                setattr(layer, name, Silent(self._others[name]))
            with suppress(Enough):
                ended = run_layer(layer, states, self._calls)
        finally:
            for name, child in kept.items():
                setattr(layer, name, child)
            for handle in handles:
                handle.remove()
        return seen, ended

    def _note(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._others[name] = len(output) - 1 if isinstance(output, tuple) else None

        return note


def _children(part: Part) -> set[str]:
    return {child_of(feed) for feed in part.feeds}


def run_layer(layer: nn.Module, states: Tensor, calls: Calls) -> Tensor:
    """One batch through a layer, called as the model itself calls it."""
    output = layer(states, **calls[id(layer)][states.shape[0]])
    states = output[0] if isinstance(output, tuple) else output
    return states


def advance(layer: nn.Module, hidden: Hidden, calls: Calls) -> None:
    """All batches of a stream through a layer."""
    for number, states in enumerate(hidden):
        hidden[number] = run_layer(layer, states, calls)
