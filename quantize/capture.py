"""What a layer is fed: forwards that record their inputs, and arguments that are recorded to call layers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtool.convert.models.feeds import Feed
from qtool.quantize.statistics import InputStatistics

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


def of_own_stream(layer: nn.Module, feed: Feed) -> InputStatistics:
    """Empty statistics whose drift goes through the matrices where that makes it smaller."""
    weights: list[Tensor] = [matrix.of(layer.get_parameter(matrix.tensor)) for matrix in feed.consumers]
    rows, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    return InputStatistics(through=torch.cat(weights) if rows < columns else None)


def adder(into: Mapping[str, InputStatistics], source: Mapping[str, Tensor]) -> Callable[[str, Tensor], None]:
    """For `captured`: counts an input beside the source's own for the same tokens."""
    return lambda name, x: into[name].add(x, source[name])


def run_layer(layer: nn.Module, states: Tensor, calls: Calls) -> Tensor:
    """One batch through a layer, called as the model itself calls it."""
    output = layer(states, **calls[id(layer)][states.shape[0]])
    states = output[0] if isinstance(output, tuple) else output
    return states


def advance(layer: nn.Module, hidden: Hidden, calls: Calls) -> None:
    """All batches of a stream through a layer."""
    for number, states in enumerate(hidden):
        hidden[number] = run_layer(layer, states, calls)
