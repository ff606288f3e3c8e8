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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from qtool.convert.files.durable import write_whole
from qtool.evaluate.engines.cache import KeptCache, make_layer
from qtool.evaluate.engines.condition import PLAIN, Condition
from qtool.evaluate.engines.engine import CHUNK
from qtool.evaluate.engines.streamed import StreamedModel

EVERY = 60.0  # seconds of work that a kill may cost, beside the layer in work
FORWARDED = ("attention_type", "layer_type", "is_sliding")  # what some models ask a layer for before they call it


@dataclass(frozen=True)
class Sweep:
    """``model`` under ``condition``; ``chunk``: queries at a time; ``folder``: where hidden states lie meanwhile;
    ``every``: seconds between two savings; ``progress``: called after each layer."""

    model: StreamedModel
    chunk: int
    folder: Path
    condition: Condition = PLAIN
    every: float = EVERY
    progress: Callable[[], None] = lambda: None

    @torch.inference_mode()
    def states(self, window: Tensor) -> Tensor:
        """Hidden states ``[length, hidden]`` behind the last norm, of ``window`` int64 ``[length]``, on the model's
        device. Raises QtoolError where the model lacks a tensor."""
        layers = self.model.layers
        done, states = self._found(len(window))
        if states is None:
            states = self._embedded(window)
        for _ in range(done):
            self.progress()
        saved = time.monotonic()
        for number in range(done, len(layers)):
            self._advance(number, states)
            self.progress()
            last = number + 1 == len(layers)
            if last or time.monotonic() - saved > self.every:
                self._save(number + 1, states)
                saved = time.monotonic()
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

    def _embedded(self, window: Tensor) -> Tensor:
        """What the model feeds to its first layer."""
        cache = self._cache(len(window))
        parts = [self._asked(0, cache, {"input_ids": part[None].to(self.model.where)}) for part in window.split(CHUNK)]
        return torch.cat([part.hidden[0] for part in parts])

    def _advance(self, number: int, states: Tensor) -> None:
        """All positions through a layer, in place."""
        cache = self._cache(len(states))
        layer = self.model.fill(number)
        try:
            for start in range(0, len(states), self.chunk):
                part = states[start : start + self.chunk][None]
                arguments = self._asked(number, cache, {"inputs_embeds": part}).arguments
                mask = cache.mask(part.shape[1], part)
                if mask is not None:
                    arguments["attention_mask"] = mask
                output = layer(part, **arguments)
                states[start : start + self.chunk] = (output[0] if isinstance(output, tuple) else output)[0]
                del arguments, mask, output
        finally:
            layer.to("meta")

    def _cache(self, length: int) -> KeptCache:
        """Every layer's is the one at work: the model's own code asks any of them how much it has seen."""
        own = make_layer(self.model.model, self.condition, length)
        return KeptCache([own] * len(self.model.layers), self.condition)

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

    def _found(self, length: int) -> tuple[int, Tensor | None]:
        """(layers done, hidden states behind them) of an earlier run; damaged ones are made again."""
        for path in sorted(self.folder.glob("*.safetensors"), reverse=True):
            try:
                with safe_open(path, framework="pt", device=str(self.model.where)) as file:
                    states = file.get_tensor("states")
                if len(states) == length and path.stem.isdecimal():
                    return int(path.stem), states
            except (SafetensorError, OSError, ValueError):
                continue
        return 0, None

    def _save(self, done: int, states: Tensor) -> None:
        path = self.folder / f"{done:05}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = list(self.folder.glob("*.safetensors"))
        write_whole(path, save({"states": states.cpu()}))
        for other in earlier:
            if other != path:
                other.unlink()


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
