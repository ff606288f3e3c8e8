"""A server under load, in two ways: closed loop (so many users, each asks again once answered) and open loop (requests
arrive at random whether or not the server keeps up).

In an open loop a request's latency counts from the moment at which it was planned to arrive, not from when a thread was
free to send it: a server that stalls delays every request planned in the meantime, and a client that waits with them
would hide that (coordinated omission). Requests that fail are answers, too: they count, as infinitely slow ones.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

from qtool import QtoolError
from qtool.evaluate.engines.engine import OutOfMemory
from qtool.measure.measure import random_prompt

Prompt = tuple[int, ...]
Stamps = tuple[list[float], int, int | None]  # seconds to each piece, tokens made, tokens from a cache
Send = Callable[[Prompt], Stamps]  # raises QtoolError, OutOfMemory
MOST_THREADS = 512  # requests under way at once


@dataclass(frozen=True)
class Answered:
    """One request; seconds count from the beginning of its level. ``planned``: when it was to arrive; ``sent``: when
    it was; ``first`` and ``last`` token, None where it failed, with the ``fault``."""

    planned: float
    sent: float
    ended: float
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    cached: int | None = None
    fault: str = ""

    @property
    def first_seconds(self) -> float | None:
        """To the first token, from the planned arrival."""
        return None if self.first is None else self.first - self.planned

    @property
    def step_seconds(self) -> float | None:
        """Mean seconds to each further token; None where there was none."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)


@dataclass(frozen=True)
class Prompts:
    """Random prompts of ``length`` ids below ``vocabulary``, of which the first ``shared`` are the same in all."""

    length: int
    shared: int
    vocabulary: int
    seed: int

    def take(self, count: int, level: int) -> list[Prompt]:
        """Of a level: others at every level, so that none finds an earlier one's in a cache, but for what is shared."""
        beginning = random_prompt(random.Random(f"{self.seed}:shared"), self.shared, self.vocabulary)
        source = random.Random(f"{self.seed}:{level}")
        own = self.length - self.shared
        return [beginning + random_prompt(source, own, self.vocabulary) for _ in range(count)]


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which ``count`` requests arrive, ``rate`` a second on average, independently (a Poisson process)."""
    source, at, found = random.Random(f"{seed}:arrivals"), 0.0, []
    for _ in range(count):
        at += source.expovariate(rate)
        found.append(at)
    return found


def closed_loop(send: Send, prompts: Sequence[Prompt], users: int) -> list[Answered]:
    """``users`` at once, each of whom asks again as soon as it is answered, until every prompt was put."""
    waiting, lock = iter(prompts), threading.Lock()
    started = time.perf_counter()
    answered: list[Answered] = []

    def user() -> None:
        while True:
            with lock:
                prompt = next(waiting, None)
            if prompt is None:
                return
            found = _ask(send, prompt, time.perf_counter() - started, started)
            with lock:
                answered.append(found)

    with _pool(users) as pool:
        try:
            done, _ = wait([pool.submit(user) for _ in range(users)], return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            with lock:
                waiting = iter(())  # Ctrl-C: what is under way ends, nothing new is asked
            raise
    return answered


def open_loop(send: Send, prompts: Sequence[Prompt], planned: Sequence[float]) -> list[Answered]:
    """Each prompt at its ``planned`` second, whatever became of those before it."""
    started = time.perf_counter()

    def one(prompt: Prompt, at: float) -> Answered:
        return _ask(send, prompt, at, started)

    with _pool(min(MOST_THREADS, len(prompts))) as pool:
        futures = []
        for prompt, at in zip(prompts, planned, strict=True):
            time.sleep(max(0.0, at - (time.perf_counter() - started)))
            futures.append(pool.submit(one, prompt, at))
        return [future.result() for future in futures]


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Ended with the block; where that is left by an exception, what has not begun is dropped."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _ask(send: Send, prompt: Prompt, planned: float, started: float) -> Answered:
    sent = time.perf_counter() - started
    try:
        times, made, cached = send(prompt)
    except (QtoolError, OutOfMemory) as error:
        said = error.message if isinstance(error, QtoolError) else f"{error.status}: {error}"
        return Answered(planned, sent, time.perf_counter() - started, fault=_printable(said))
    ended = time.perf_counter() - started
    return Answered(planned, sent, ended, sent + times[0], sent + times[-1], made, cached)


def _printable(said: str) -> str:
    """A server's words as one short line that hides nothing."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(said.split()))[:200]
