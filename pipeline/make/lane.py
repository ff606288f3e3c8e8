"""Where matrices are packed and compared: on the accelerator that holds their codes, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Lane:
    """A stream of its own on ``device``: what is queued on the walk's stream is not waited for, and as only one matrix
    is worked on, memory for one is taken. On a processor there is nothing to hold: each thread works for itself."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._lock = device, threading.Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> torch.cuda.Event | None:
        """The present end of the walk's queue, behind which codes are whole that it has given away."""
        return None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

    @contextmanager
    def held(self, made: torch.cuda.Event | None) -> Iterator[None]:
        """What the block computes runs here, on codes that were whole at ``made``. It has to end with a number in host
        memory: whoever frees its tensors does not wait for this stream."""
        if self._stream is None:
            yield
            return
        with self._lock, torch.cuda.stream(self._stream):
            if made is not None:
                self._stream.wait_event(made)
            yield
