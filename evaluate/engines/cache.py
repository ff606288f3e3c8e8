"""A key/value cache with room to grow: transformers' own copies all of it for every new token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64  # positions taken in advance


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """A `DynamicLayer` whose ``keys`` and ``values`` are the filled part of larger tensors."""

    keys: Any
    values: Any
    reserve: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, length, dim]`` with the new positions at their end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if start == 0 or self.reserve is None or end > self.reserve[0].shape[-2]:
            self.reserve = (_grown(self.keys, key_states, start, end), _grown(self.values, value_states, start, end))
        for tensor, new in zip(self.reserve, (key_states, value_states), strict=True):
            tensor[..., start:end, :] = new
        self.keys, self.values = (tensor[..., :end, :] for tensor in self.reserve)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self.reserve = None


def _grown(old: Tensor, new: Tensor, start: int, end: int) -> Tensor:
    # an eighth more than asked for: long windows are not copied for each of their chunks
    larger = new.new_empty(*new.shape[:-2], end + max(ROOM, end // 8), new.shape[-1])
    if start:
        larger[..., :start, :] = old
    return larger


def make_cache(config: Any) -> DynamicCache:
    """transformers' cache for this model; its plain layers (no sliding window, no state of their own) get room."""
    cache = DynamicCache(config=config)
    if (loops := getattr(config, "loop_num", 1)) > 1:  # each turn keeps its own; the model masks what lies out of it
        cache.layers = [DynamicLayer() for _ in range(loops * config.num_hidden_layers)]
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
