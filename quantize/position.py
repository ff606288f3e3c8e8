"""Where a walk is: which matrices of which layer are in work, and how much of the layer's work is behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _unheard(layer: int, share: float, what: str) -> None:
    """Nobody watches."""


@dataclass
class Position:
    """``tell(layer, share, what)`` is called when work on something begins; ``share``: of the layer's steps that have
    ended. A step is the rounding of matrices that share an input, in one output."""

    tell: Callable[[int, float, str], None] = _unheard
    layer: int = 0
    steps: int = 1
    ended: int = 0

    def enter(self, layer: int, steps: int) -> None:
        """A layer begins, of so many steps (on this rank)."""
        self.layer, self.steps, self.ended = layer, max(1, steps), 0

    def at(self, what: str) -> None:
        """Work on ``what`` begins."""
        self.tell(self.layer, min(1.0, self.ended / self.steps), what)

    def end(self) -> None:
        """A step has ended."""
        self.ended += 1
