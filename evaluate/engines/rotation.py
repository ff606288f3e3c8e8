"""Rotations that depend on the length of the text (`dynamic`, `longrope`), for a text that is taken up in parts.

transformers looks at the largest position of a forward. Of a part that is the part's own, so early parts would be
rotated as those of a shorter text: other numbers than one forward over the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

BY_LENGTH = ("dynamic", "longrope")


@contextmanager
def rotated_for(model: nn.Module, length: int) -> Iterator[None]:
    """Within the block ``model``, or its body, rotates positions as in one forward over ``length`` tokens."""
    body: Any = getattr(model, str(getattr(model, "base_model_prefix", "model")), model)
    rotary = getattr(body, "rotary_emb", None)
    if rotary is None or getattr(rotary, "rope_type", "") not in BY_LENGTH:
        yield
        return
    body.rotary_emb = _OfWhole(rotary, length)
    try:
        yield
    finally:
        body.rotary_emb = rotary


class _OfWhole(nn.Module):
    """Shows ``rotary`` the text's last position beside those that are asked for."""

    def __init__(self, rotary: nn.Module, length: int) -> None:
        super().__init__()
        self.rotary, self.length = rotary, length

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Called by the model: cosines and sines ``[rows, positions, dim]``."""
        last = position_ids.new_full((position_ids.shape[0], 1), self.length - 1)
        cos, sin = self.rotary(x, torch.cat([position_ids, last], dim=1))
        return cos[:, :-1], sin[:, :-1]
