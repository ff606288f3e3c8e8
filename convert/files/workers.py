"""Threads that work side by side, each with one processor: matrices packed and compared, tensors looked at."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

MOST = 32  # whoever has more processors waits for memory by then


@contextmanager
def workers(name: str, most: int = MOST) -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch computes with here, ``most`` at most. Within each torch computes alone: many small
    tasks beside each other take less than each of them cut into parts, and no thread waits for another's part."""
    threads = torch.get_num_threads()
    count = max(1, min(most, threads))
    started = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        started.wait()

    with ThreadPoolExecutor(count, name, initializer=begin) as pool:
        for _ in range(count):
            pool.submit(int)
        started.wait()
        torch.set_num_threads(threads)  # the number set last is what threads take over that begin later
        yield pool
