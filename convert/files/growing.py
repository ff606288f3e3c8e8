"""The sha256 of a file while it grows: what is final from its beginning on is hashed by a thread, while the rest is
made.

Tensors are written at their offsets in any order, and a file is hashed from its beginning. So the digest follows the
first place that is still empty. It is taken of the file, not of what was given to be written.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from qtool.convert.files.watch import SETTLED, stamp_of, take_digest

Stretch = tuple[str, int, int]  # file, first byte, byte behind the last
CHUNK = 1 << 22


class _Growing:
    """One file. ``cuts``: where its tensors begin, and its end: what lies between two tensors belongs to the first."""

    def __init__(self, path: Path, header: int, cuts: Iterable[int]) -> None:
        self.path = path
        self.cuts = sorted({header, *cuts})
        self.final: dict[int, int] = {}  # first byte -> byte behind the last: what lies beyond
        self.reached = self.cuts[0]  # all before it is final
        self.hashed, self.digest = 0, hashlib.sha256()

    def stretch(self, offset: int, count: int) -> tuple[int, int]:
        """(first byte, byte behind the last) of what is final with these."""
        return offset, self.cuts[bisect_left(self.cuts, offset + count)]

    def add(self, begin: int, end: int) -> None:
        """These bytes are final. Where they were hashed before, all is hashed again."""
        if begin < self.reached:
            self.final[0] = self.reached
            self.reached, self.hashed, self.digest = 0, 0, hashlib.sha256()
        self.final[begin] = max(end, self.final.get(begin, 0))
        while (until := self.final.pop(self.reached, None)) is not None:
            self.reached = until


class GrowingDigests:
    """The files of one writer, and the thread that hashes them. ``headers``: file -> bytes before its first tensor;
    ``sizes``: file -> all its bytes; ``offsets``: file -> where its tensors begin."""

    def __init__(
        self, folder: Path, headers: Mapping[str, int], sizes: Mapping[str, int], offsets: Mapping[str, list[int]]
    ) -> None:
        self._files = {
            name: _Growing(folder / name, headers[name], [*offsets.get(name, ()), size]) for name, size in sizes.items()
        }
        self._thread = ThreadPoolExecutor(1, "hashing")
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._last: Future[None] | None = None

    def stretch(self, file: str, offset: int, count: int) -> Stretch:
        """What is final with ``count`` bytes from ``offset`` on: padding behind them too."""
        return (file, *self._files[file].stretch(offset, count))

    def add(self, stretches: Iterable[Stretch]) -> None:
        """These are on the disk and stay as they are."""
        with self._lock:
            for file, begin, end in stretches:
                self._files[file].add(begin, end)

    def follow(self) -> None:
        """Hash as far as all is final, in the thread."""
        self._last = self._thread.submit(self._hash)

    def finish(self) -> None:
        """Nothing will be written any more: hash the rest, in the thread. Whoever asks for the sha256 of a file then
        gets this one as long as the file is not touched (`watch.sha256_file`)."""
        self._last = self._thread.submit(self._end)
        self._thread.shutdown(wait=False)

    def wait(self) -> None:
        """Until all that was asked for is done. A file that could not be read has no digest then: whoever asks for it
        reads it, and finds out why."""
        if self._last is not None:
            wait([self._last])

    def stop(self) -> None:
        """Do no more."""
        self._stopped.set()
        self._thread.shutdown(cancel_futures=True)

    def _hash(self) -> None:
        for growing in self._files.values():
            self._read(growing)

    def _end(self) -> None:
        stamps = {name: stamp_of(growing.path) for name, growing in self._files.items()}
        newest = max((stamp[2] for stamp in stamps.values()), default=0)
        self._stopped.wait(max(0.0, (newest + SETTLED - time.time_ns()) / 1e9))  # a change from here on shows
        for name, growing in self._files.items():
            with self._lock:
                growing.final, growing.reached = {}, growing.cuts[-1]
            if self._read(growing):
                take_digest(growing.path, stamps[name], growing.digest.hexdigest())

    def _read(self, growing: _Growing) -> bool:
        """Whether all of the file is hashed."""
        buffer = memoryview(bytearray(CHUNK))
        with growing.path.open("rb", buffering=0) as file:
            while not self._stopped.is_set():
                with self._lock:
                    digest, at, rest = growing.digest, growing.hashed, growing.reached - growing.hashed
                if rest <= 0:
                    break
                count = os.preadv(file.fileno(), [buffer[: min(rest, CHUNK)]], at)
                if not count:
                    return False  # cut off meanwhile: whoever seals it will see
                digest.update(buffer[:count])
                with self._lock:
                    if digest is growing.digest:  # else it begins anew
                        growing.hashed = at + count
        return growing.hashed == growing.cuts[-1]
