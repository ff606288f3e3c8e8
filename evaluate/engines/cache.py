"""The key/value caches that models have here: with room to grow (transformers' own copies all of it for every new
token), in a type that is simulated, with a rolling window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from qtool import QtoolError
from qtool.evaluate.engines.cache_types import rounding
from qtool.evaluate.engines.condition import PLAIN, Condition
from qtool.evaluate.engines.window_cache import WindowLayer, turning

ROOM = 64  # positions taken in advance


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """A `DynamicLayer` whose ``keys`` and ``values`` are the filled part of larger tensors."""

    keys: Any
    values: Any
    reserve: tuple[Tensor, Tensor] | None = None

    def __init__(self, length: int = 0) -> None:
        super().__init__()
        self.length = length  # that is known beforehand

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, length, dim]`` with the new positions at their end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if start == 0 or self.reserve is None or end > self.reserve[0].shape[-2]:
            # else an eighth more than asked for: long windows are not copied for each of their chunks
            room = max(self.length, end if end <= self.length else end + max(ROOM, end // 8))
            self.reserve = (_grown(self.keys, key_states, start, room), _grown(self.values, value_states, start, room))
        for tensor, new in zip(self.reserve, (key_states, value_states), strict=True):
            tensor[..., start:end, :] = new
        self.keys, self.values = (tensor[..., :end, :] for tensor in self.reserve)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self.reserve = None


def _grown(old: Tensor, new: Tensor, start: int, room: int) -> Tensor:
    larger = new.new_empty(*new.shape[:-2], room, new.shape[-1])
    if start:
        larger[..., :start, :] = old
    return larger


class KeptCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """Layers that keep keys and values under ``condition``."""

    def __init__(self, layers: list[Any], condition: Condition = PLAIN) -> None:
        super().__init__(layers=layers)
        self.round = rounding(condition.cache)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Of one layer: new ones are rounded before anything sees them, as where a kernel reads the cache alone."""
        found: tuple[Tensor, Tensor] = super().update(
            self.round(key_states), self.round(value_states), layer_idx, *args, **kwargs
        )
        return found

    def mask(self, new: int, like: Tensor) -> Tensor | None:
        """What the next ``new`` queries need for an attention mask where a window rolls; None where the model makes its
        own."""
        first = self.layers[0]
        return first.mask(new, like) if isinstance(first, WindowLayer) else None


def make_cache(model: Any, condition: Condition = PLAIN) -> KeptCache:
    """For all layers; transformers' plain ones (no sliding window, no state of their own) get room. Raises QtoolError
    for a model in which no window can roll."""
    layers = DynamicCache(config=model.config).layers
    if (loops := getattr(model.config, "loop_num", 1)) > 1:  # each turn keeps its own, and masks what lies out of it
        layers = [DynamicLayer() for _ in range(loops * model.config.num_hidden_layers)]
    if condition.recent:
        _require_keys(layers)
        turn = turning(model)
        return KeptCache([WindowLayer(condition, turn) for _ in layers], condition)
    return KeptCache([RoomyLayer() if type(layer) is DynamicLayer else layer for layer in layers], condition)


def _require_keys(layers: Sequence[Any]) -> None:
    if any(not isinstance(layer, DynamicLayer) for layer in layers):
        raise QtoolError(
            "some layers of this model keep states (of convolutions) in place of keys and values; no window rolls over "
            "them, and no text is taken through one alone."
        )


def make_layer(model: Any, condition: Condition, length: int) -> Any:
    """What one layer keeps of a text of ``length`` tokens that is taken through it alone. Raises QtoolError for a model
    whose layers keep states in place of keys and values."""
    _require_keys(DynamicCache(config=model.config).layers)
    return WindowLayer(condition, turning(model)) if condition.recent else RoomyLayer(length)
