"""A rolling cache with sinks (StreamingLLM, arXiv:2309.17453): of a long text the first tokens and the last ones stay.

Positions count inside the cache, so the query sits `sink + recent - 1` behind the first sink however long the text has
become. Rotary attention sees differences alone: here queries and recent keys keep their true positions, and the sinks
are turned forward by what the window has moved. While the text fits, nothing is turned: it is full attention.

A chunk of queries needs the sinks once for each of them, each time turned otherwise; `mask` says which are whose.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from qtool import QtoolError
from qtool.evaluate.engines.condition import Condition
from qtool.evaluate.engines.rotation import BY_LENGTH

Turn = Callable[[Tensor, Tensor], Tensor]  # keys [batch, heads, n, dim], by how many positions int64 [n] -> turned


class WindowLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """``keys`` and ``values``: the sinks and the ``recent - 1`` last tokens, rotated by their true positions."""

    keys: Any
    values: Any

    def __init__(self, condition: Condition, turn: Turn) -> None:
        super().__init__()
        self.condition, self.turn, self.seen = condition, turn, 0

    def get_seq_length(self) -> int:
        """Tokens seen, whether they stayed or not: the next one's position."""
        return self.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the new queries attend to, in the order of `mask`; then all but sinks and recent ones are let go."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        held = self.seen > 0
        keys = torch.cat([self.keys, key_states], dim=-2) if held else key_states
        values = torch.cat([self.values, value_states], dim=-2) if held else value_states
        start, self.seen = self.seen, self.seen + new
        sink, recent = self.condition.sink, self.condition.recent
        stays = max(sink, keys.shape[-2] - recent + 1)
        self.keys = torch.cat([keys[..., :sink, :], keys[..., stays:, :]], dim=-2)
        self.values = torch.cat([values[..., :sink, :], values[..., stays:, :]], dim=-2)
        if self.seen <= sink + recent or not sink:
            return keys, values
        by = _moved(start, new, self.condition, keys.device).repeat_interleave(sink)
        sinks = self.turn(keys[..., :sink, :].repeat(1, 1, new, 1), by)
        return (
            torch.cat([sinks, keys[..., sink:, :]], dim=-2),
            torch.cat([values[..., :sink, :].repeat(1, 1, new, 1), values[..., sink:, :]], dim=-2),
        )

    def mask(self, new: int, like: Tensor, seen: int | None = None) -> Tensor:
        """What is added to the scores of the next ``new`` queries: ``[1, 1, new, keys]``, 0 or the least number of
        ``like``'s dtype, for the keys that `update` will give. ``seen``: tokens before them (None: as now)."""
        sink, recent, device = self.condition.sink, self.condition.recent, like.device
        seen = self.seen if seen is None else seen
        query = torch.arange(seen, seen + new, device=device).unsqueeze(1)
        first = max(min(sink, seen), seen - recent + 1)  # of the kept tokens behind the sinks
        late = torch.arange(first, seen + new, device=device)
        if seen + new <= sink + recent or not sink:
            at = torch.cat([torch.arange(min(sink, seen), device=device), late])
            sees = (at <= query) & ((at > query - recent) | (at < sink))
        else:
            late = late[late >= sink]
            recently = (late <= query) & (late > query - recent)
            place = torch.arange(sink, device=device)
            own = torch.eye(new, dtype=torch.bool, device=device).repeat_interleave(sink, dim=1)
            sees = torch.cat([own & (place.repeat(new) <= query), recently], dim=1)
        least = torch.finfo(like.dtype).min
        return torch.where(sees, 0.0, least).to(like.dtype)[None, None]


def _moved(start: int, new: int, condition: Condition, device: torch.device) -> Tensor:
    """How far the window has moved for each of the queries ``start`` to ``start + new``."""
    query = torch.arange(start, start + new, device=device)
    return (query - (condition.sink + condition.recent - 1)).clamp_min(0)


def turning(model: Any) -> Turn:
    """By the model's own rotation. Raises QtoolError for a model whose positions are no plain rotation, alike for texts
    of all lengths, or that lets go of tokens by itself."""
    body = getattr(model, str(getattr(model, "base_model_prefix", "model")))
    rotary: Any = getattr(body, "rotary_emb", None)
    attention = next((m for m in body.modules() if type(m).__name__.endswith("Attention")), None)
    apply = getattr(sys.modules.get(type(attention).__module__), "apply_rotary_pos_emb", None)
    kind = getattr(rotary, "rope_type", "default")
    if rotary is None or apply is None or not isinstance(kind, str) or kind in BY_LENGTH:
        raise QtoolError(f"window: the positions of {type(model).__name__} cannot be turned; leave out `window:`.")
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        raise QtoolError(f"window: layers of {type(model).__name__} slide by themselves; leave out `window:`.")
    if getattr(model.config, "loop_num", 1) > 1:
        raise QtoolError(f"window: {type(model).__name__} passes its layers more than once; leave out `window:`.")
    return _turn(rotary, apply)


def _turn(rotary: nn.Module, apply: Callable[..., tuple[Tensor, Tensor]]) -> Turn:
    scaling = float(getattr(rotary, "attention_scaling", 1.0))  # yarn's, which the keys have already

    def turn(keys: Tensor, by: Tensor) -> Tensor:
        wide = keys.float()
        cos, sin = rotary(wide, by.unsqueeze(0))
        return apply(wide, wide, cos / scaling, sin / scaling)[1].to(keys.dtype)

    return turn
