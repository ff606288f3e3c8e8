"""How a model keeps its keys and values while it is judged: the type of its cache, and what it lets go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """``cache``: a type's name, "" for the engine's own. ``recent``: the last tokens that stay beside the first
    ``sink`` ones, with positions counted inside the cache (StreamingLLM, arXiv:2309.17453); 0: all stay."""

    cache: str = ""
    sink: int = 0
    recent: int = 0

    @property
    def name(self) -> str:
        """`q8_0`, `window 4+4096`, `fp8 window 4+4096`; "" without any. Scores of two names are never paired."""
        window = f"window {self.sink}+{self.recent}" if self.recent else ""
        return " ".join(filter(None, (self.cache, window)))

    @property
    def held(self) -> int | None:
        """Tokens that stay, None for all."""
        return self.sink + self.recent if self.recent else None


PLAIN = Condition()
