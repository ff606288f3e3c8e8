"""Memory that was freed and that glibc keeps: given back between layers, once it has grown.

Tensors below the limit of cli/heap.py come out of glibc's heaps, one for each thread, and what is freed there stays the
process's own. With every layer a little more lies free between pieces that live: about 0.6 MB a layer of a small model
that is made into three outputs (docs/benchmarks.md, "Memory").
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from qtool.evaluate.engines.machine import anonymous_memory

GROWN = 32 * 2**20  # bytes: below, giving back costs more than it frees


class Freed:
    """Looks after each layer."""

    def __init__(self) -> None:
        self._trim, self._least = _trimming(), anonymous_memory() or 0

    def give_back(self) -> bool:
        """What is free goes back, where this process has grown since that was last done. Whether it did."""
        now = anonymous_memory()
        if self._trim is None or now is None or now < self._least + GROWN:
            return False
        self._trim(0)
        self._least = anonymous_memory() or now
        return True


def _trimming() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None where the C library is another."""
    try:
        library = ctypes.CDLL(None)
        found: Callable[[int], int] = library.malloc_trim
        return found if hasattr(library, "gnu_get_libc_version") else None
    except (OSError, AttributeError):
        return None
