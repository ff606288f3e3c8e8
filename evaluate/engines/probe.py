"""What a proof asks of one engine's server beside completions: each engine's own ways, behind one shape.

Addresses are those without /v1. Everything raises QtoolError (exit 3) where the server does not answer, or answers
something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qtool import QtoolError
from qtool.evaluate.engines.server import ask, read

Best = dict[int, float]  # token id -> log-probability in nats, of the likeliest tokens and of the one that follows
SECONDS = 600.0  # for one answer


@dataclass(frozen=True)
class Cache:
    """What the engine says of its cache: ``blocks`` of ``block`` tokens (None: it has no blocks), ``tokens`` in all."""

    blocks: int | None
    block: int
    tokens: int


@dataclass(frozen=True)
class Conversation:
    """What is put through a chat template: OpenAI's messages, and tools (None: none)."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Probe:
    """``forced(url, model, ids, count)``: after each token of ``ids`` but the last, the ``count`` likeliest tokens that
    follow; ``rendered``: a conversation as the server puts it to the model, as text or as ids; ``kernels``: what
    computes, from the lines of its log; ``cached`` (tokens), ``steps``, ``preempted``: its counters in /metrics, empty
    where it has none; ``chunk``: tokens of a step of a prompt, from the lines of its log (None: not said)."""

    forced: Callable[[str, str, Sequence[int], int], list[Best]]
    rendered: Callable[[str, str, Conversation], str | list[int]]
    cache: Callable[[str], Cache]
    version: Callable[[str, Sequence[str]], str]
    kernels: Callable[[Sequence[str]], list[str]]
    cached: str
    steps: str = ""
    preempted: str = ""
    chunk: Callable[[Sequence[str]], int | None] = lambda lines: None
    rounded: int = 0  # activations are rounded to 8 bits, in blocks of so many, before they are multiplied


@contextmanager
def expected(url: str) -> Iterator[None]:
    """Answers of another shape than what is read from them."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise QtoolError(f"{url}: answers something else than it should ({said}).", exit_code=3) from error


def complete(url: str, model: str, ids: Sequence[int], tokens: int = 1, **more: Any) -> dict[str, Any]:
    """One greedy completion of token ids, as the server answers it."""
    body = {"model": model, "prompt": list(ids), "max_tokens": tokens, "temperature": 0} | more
    place = f"{url}/v1/completions"
    answer = ask(place, body, SECONDS)
    with expected(place):
        text = answer["choices"][0]["text"]
        if not isinstance(text, str):
            raise TypeError("text")
    found: dict[str, Any] = answer
    return found


def metrics(url: str) -> dict[str, float]:
    """Counters and gauges by name (Prometheus' text format), labels summed over."""
    place = f"{url}/metrics"
    found: dict[str, float] = {}
    lines = read(place, timeout=SECONDS).splitlines()
    with expected(place):
        for line in lines:
            if line.strip() and not line.startswith("#"):
                named, _, value = line.rpartition(" ")
                name = named.partition("{")[0].strip()
                found[name] = found.get(name, 0.0) + float(value)
    return found
