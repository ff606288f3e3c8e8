"""What the C library keeps of memory that was freed: said to glibc once, when a command begins.

glibc asks the system for large blocks one by one and gives them back when they are freed, at first. But it learns: a
block of up to 32 MiB that was freed raises the limit for what counts as large, so that a layer's tensors soon come out
of the heap, whose freed pieces stay the process's own between others that live. A walk of 40 layers then holds twice
what it needs. A limit that is set stays as it is. What it saves and what it costs: docs/benchmarks.md, "Memory".
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

# Bytes. A block that the system gives and takes costs a fault for each of its pages: a third of the time of a small
# model's rounding where tensors of a few MiB are among them. Large models' tensors lie above. What lies free below and
# at the heap's end is given back between layers (make/freed.py).
LARGE, FREE_AT_END = 8 * 2**20, 16 * 2**20
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
TUNABLES = "GLIBC_TUNABLES"


def give_back_freed(environment: Mapping[str, str]) -> bool:
    """Blocks of `LARGE` bytes and more are the system's again when they are freed. Nothing is changed where the user
    has set glibc's limits (MALLOC_…, GLIBC_TUNABLES), or where the C library is another. Whether it was changed."""
    if any(name.startswith("MALLOC_") for name in environment) or "malloc" in environment.get(TUNABLES, ""):
        return False
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return False
        limits = {MMAP_THRESHOLD: LARGE, TRIM_THRESHOLD: FREE_AT_END}
        return all(library.mallopt(limit, size) == 1 for limit, size in limits.items())
    except (OSError, AttributeError):  # no such library, or one without mallopt
        return False
