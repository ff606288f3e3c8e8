"""One long text through a model, layer by layer: one layer's weights, keys and values are in memory, never scores of
all positions with all others.

A layer takes the text up a chunk of queries at a time, each against the keys of all positions so far; its arguments
(masks, positions, rotary tables) are what the model's own forward hands to it for that chunk. What lies between two
layers, the hidden states, is kept on the disk now and then, so that a text that took an hour is not begun again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.evaluate.engines.cache import KeptCache, make_layer
from qtool.evaluate.engines.condition import PLAIN, Condition
from qtool.evaluate.engines.engine import CHUNK
from qtool.evaluate.engines.kept_states import KeptStates
from qtool.evaluate.engines.rotation import rotated_for
from qtool.evaluate.engines.share import ALONE, Share, SharedLayer
from qtool.evaluate.engines.streamed import StreamedModel

EVERY = 60.0  # seconds of work that a kill may cost, beside the layer in work
FORWARDED = ("attention_type", "layer_type", "is_sliding")  # what some models ask a layer for before they call it


@dataclass(frozen=True)
class Sweep:
    """``model`` under ``condition``; ``queries``: at a time, at most; ``folder``: where hidden states lie meanwhile;
    ``every``: seconds between two savings; ``progress``: called after each layer; ``share``: this rank's of the text's
    positions."""

    model: StreamedModel
    queries: int
    folder: Path
    condition: Condition = PLAIN
    every: float = EVERY
    progress: Callable[[], None] = lambda: None
    share: Share = ALONE

    @torch.inference_mode()
    def states(self, window: Tensor) -> Tensor:
        """Hidden states ``[positions, hidden]`` behind the last norm, of ``window`` int64 ``[length]``, on the model's
        device: those of the chunks that `Share.starts` names. Raises QtoolError where the model lacks a tensor."""
        length, count = len(window), len(self.model.layers)
        own = self.share.own(length, self.share.chunk(length, self.queries))
        kept = KeptStates(self.folder, self.share)
        done, states = kept.found(own, length, self.model.where)
        with rotated_for(self.model.body, length):
            if states is None:
                states = self._embedded(window[own], length)
            for _ in range(done):
                self.progress()
            saved = time.monotonic()
            for number in range(done, count):
                self._advance(number, states, length)
                self.progress()
                due = number + 1 == count or time.monotonic() - saved > self.every
                if any(self.share.tell(due)):
                    kept.save(number + 1, states, own)
                    saved = time.monotonic()
        states = self.share.for_head(states, length, self.share.chunk(length, self.queries))
        for start in range(0, len(states), CHUNK):
            states[start : start + CHUNK] = self.model.last_norm(states[start : start + CHUNK])
        return states

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Iterator[Tensor]:
        """Of `states`, `CHUNK` positions at a time."""
        for part in states.split(CHUNK):
            yield self.model.head(part)

    def close(self) -> None:
        """What was kept meanwhile is needed no longer."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _embedded(self, tokens: Tensor, length: int) -> Tensor:
        """What the model feeds to its first layer."""
        _, cache = self._cache(length)
        parts = [self._asked(0, cache, {"input_ids": part[None].to(self.model.where)}) for part in tokens.split(CHUNK)]
        return torch.cat([part.hidden[0] for part in parts])

    def _advance(self, number: int, states: Tensor, length: int) -> None:
        """All own positions through a layer, in place."""
        kept, cache = self._cache(length)
        layer = self.model.fill(number)
        try:
            start = 0
            for spans in self.share.steps(length, self.share.chunk(length, self.queries)):
                end = start + len(spans[self.share.rank])
                if kept.begin(spans):
                    part = states[start:end][None]
                    arguments = self._asked(number, cache, {"inputs_embeds": part}).arguments
                    mask = kept.mask(part.shape[1], part)
                    if mask is not None:
                        arguments["attention_mask"] = mask
                    output = layer(part, **arguments)
                    states[start:end] = (output[0] if isinstance(output, tuple) else output)[0]
                    del arguments, mask, output
                start = end
        finally:
            layer.to("meta")

    def _cache(self, length: int) -> tuple[SharedLayer, KeptCache]:
        """What the layer at work keeps, and the same in each layer's place: the model's own code asks any of them how
        much it has seen."""
        own = make_layer(self.model.model, self.condition, length)
        shared = SharedLayer(own, self.share, self.share.chunk(length, self.queries))
        return shared, KeptCache([shared] * len(self.model.layers), self.condition)

    def _asked(self, number: int, cache: KeptCache, given: dict[str, Any]) -> _Recorder:
        """What the model hands to a layer for a chunk: its own forward, with stand-ins for all layers."""
        body, layers = self.model.body, self.model.layers
        recorders = [_Recorder(layer) for layer in layers]
        body.layers = nn.ModuleList(recorders)
        try:
            body(**given, past_key_values=cache, use_cache=True)
        finally:
            body.layers = layers
        return recorders[number]


class _Recorder(nn.Module):
    """Stands in for a layer: keeps what it was called with, passes its input on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hidden, self.arguments = torch.empty(0), dict[str, Any]()
        for name in FORWARDED:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """Called by the model."""
        self.hidden, self.arguments = hidden_states, arguments
        return hidden_states
