"""What an engine is, as data and pure functions: what a scorecard says of it, what `qtool plan` sizes with.

An engine's own module fills one `EngineFacts`; nothing outside asks for an engine by its name.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from qtool.convert.models.geometry import Geometry
from qtool.evaluate.engines.condition import Condition

MIB, GIB = 2**20, 2**30
CUDA_CONTEXT = 500 * MIB  # driver context, loaded kernels: 0.4 to 0.6 GiB on Ampere and later


@dataclass(frozen=True)
class CacheType:
    """One type of a key/value cache: ``width`` bytes to a number, ``block`` numbers of a head that share a scale."""

    name: str
    width: Fraction
    block: int = 1


BF16, F16, FP8 = CacheType("bf16", Fraction(2)), CacheType("f16", Fraction(2)), CacheType("fp8", Fraction(1))
# blocks of 32 carry an fp16 scale (ggml/src/ggml-common.h)
Q8_0, Q4_0 = CacheType("q8_0", Fraction(34, 32), 32), CacheType("q4_0", Fraction(18, 32), 32)


@dataclass(frozen=True)
class Efficiency:
    """Shares of the bus for weights and for the cache, of the dense rate in prefill; host seconds a layer of each pass
    and a forward."""

    weights: float
    cache: float
    compute: float
    per_layer: float
    per_forward: float


@dataclass(frozen=True)
class Overhead:
    """Bytes on one card beside weights and cache. ``activations``: grows with the tokens of one forward; ``fixed``:
    does not."""

    activations: int
    fixed: int

    @property
    def total(self) -> int:
        return self.activations + self.fixed


class Card(Protocol):
    """What engines ask of a card (`qtool.sizing.accelerators.Accelerator` has it)."""

    @property
    def key(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def memory(self) -> int: ...
    @property
    def compute(self) -> str: ...
    @property
    def cuda(self) -> bool: ...
    @property
    def unified(self) -> bool: ...
    @property
    def processor(self) -> bool: ...


@dataclass(frozen=True)
class Load:
    """What is asked of a model on its cards: ``sequences`` at once of ``context`` tokens each. ``expanded``: bytes of
    the largest matrix that is expanded to 16 bits before it is multiplied (NF4)."""

    geometry: Geometry
    card: Card
    cards: int
    context: int
    sequences: int
    expanded: int = 0


@dataclass(frozen=True)
class OffloadRule:
    """What can lie outside the cards. ``computed_there``: whole layers, their cache too, at the speed of host memory;
    else weights cross the host link at each step. ``unit``: bytes that move together (None: a layer).
    ``flag(units moved, layers of the model)``: what to type. ``experts(layers)``: what to type to leave the routed
    experts of the first layers there, and nothing else; None where it cannot."""

    flag: Callable[[int, int], str]
    computed_there: bool = False
    unit: int | None = None
    experts: Callable[[int], str] | None = None


@dataclass(frozen=True)
class Serving:
    """What a command that serves is made of. ``place``: folder or Hub id; ``revision``: the Hub's, of a model that is
    there already; ``file``: the .gguf file, where there is one; ``config``: config.json of what is served;
    ``cache_type``: its name; ``offload``: the rule's flag, empty where all fits. ``name``: what the server calls the
    model; ``dtype``: of the activations, empty for what the files say; ``prefill``: tokens of one step of a prompt;
    ``processor``: no card is used; ``cache_bytes``: of the whole cache; ``share``: of a card's memory."""

    place: str
    revision: str | None
    file: Path | None
    default_file: str
    config: Mapping[str, Any]
    context: int
    sequences: int
    cards: int
    cache_type: str
    offload: str
    name: str = ""
    dtype: str = ""
    prefill: int = 0
    prefix_cache: bool = True
    processor: bool = False
    cache_bytes: int = 0
    share: float = 1.0
    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def served_dtype(self) -> str:
        """What was asked for, else what config.json says; of packed weights, whose kernels lack float32, bfloat16."""
        said = self.dtype or str(self.config.get("dtype") or self.config.get("torch_dtype") or "")
        said = said.removeprefix("torch.")
        return "bfloat16" if said == "float32" and self.config.get("quantization_config") else said


@dataclass(frozen=True)
class Launch:
    """How a server is started. ``words``: its program and arguments; ``environment``: what it is told beside them;
    ``after``: commands that follow once it answers."""

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    after: tuple[tuple[str, ...], ...] = ()

    @property
    def text(self) -> str:
        """A line for a shell."""
        told = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        line = " ".join([*told, shlex.join(self.words)])
        if not self.after:
            return line
        more = "; ".join(" ".join([*told, shlex.join(words)]) for words in self.after)
        return f"{line} & sleep 3; {more}; wait"


@dataclass(frozen=True)
class Download:
    """A published artifact, as a card tells how to load it. ``repo``: its Hub id; ``place``: what an engine that reads
    folders is given; ``fetch``: the command that brings the files; ``folder``: where they lie then, with a slash at the
    end; ``files``: their names; ``packages``: what the format needs beside the engine."""

    repo: str
    place: str
    fetch: str
    folder: str
    files: tuple[str, ...]
    packages: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the repository."""
        return self.repo.split("/")[-1]


@dataclass(frozen=True)
class Metrics:
    """The names under which an engine's /metrics says what happens in it; empty where it does not say it.

    ``prefix``: all its names begin so. ``since``: the version whose page was seen, or whose source was read;
    ``switch``: what must be typed so that it answers at all; ``late``: a name comes to the page when it is first used;
    ``label``: says which model a line is of. Gauges: ``cache`` (share of the cache in use, 0 to 1),
    ``running`` and ``waiting`` (requests). Counters: ``preempted`` (requests thrown out of a full cache, to be
    computed again), ``prompt`` and ``generated`` (tokens), ``hits`` (prompt tokens found in the prefix cache) of the
    sum of ``asked``. Histograms of seconds: ``first`` (to the first token) and ``step`` (between tokens); without the
    latter the mean ``step_mean``: (counter of seconds, counter of tokens).
    """

    prefix: str
    since: str
    switch: str = ""
    late: bool = False
    label: str = ""
    cache: str = ""
    running: str = ""
    waiting: str = ""
    preempted: str = ""
    prompt: str = ""
    generated: str = ""
    hits: str = ""
    asked: tuple[str, ...] = ()
    first: str = ""
    step: str = ""
    step_mean: tuple[str, str] | None = None

    def names(self) -> dict[str, tuple[str, ...]]:
        """What it says -> the names that must be on its page; a histogram's are those of its buckets and its count."""
        single = ("cache", "running", "waiting", "preempted", "prompt", "generated", "hits")
        found: dict[str, tuple[str, ...]] = {what: (name,) for what in single if (name := getattr(self, what))}
        histograms = {"first": self.first, "step": self.step}
        found |= {what: (f"{name}_bucket", f"{name}_count") for what, name in histograms.items() if name}
        found |= {"asked": self.asked} if self.asked else {}
        return found | ({"step_mean": self.step_mean} if self.step_mean else {})


def whole_context(context: int, window: int | None, chunk: int) -> int:
    """A cache without blocks: the context, or the window that a layer slides."""
    return context if window is None else min(context, window)


@dataclass(frozen=True)
class EngineFacts:
    """One engine. Without ``cache_types`` nothing is planned for it or measured in it."""

    name: str
    packages: tuple[str, ...] = ()  # whose versions a scorecard names
    install: str = ""
    place: str = ""  # where it computes, for the scorecard; empty: on the device that was asked for
    dtype: Callable[[str], str] = lambda device: "as stored"  # device's kind -> what the scorecard says
    logits: bool = False  # gives the logits of all positions, which perplexity and KL need
    layered: bool = False  # takes a long text through one layer at a time
    judged_caches: tuple[CacheType, ...] = ()  # that its models can be judged with, beside its own
    simulates: bool = False  # it rounds numbers to them, and keeps them as wide as ever
    rolls: bool = False  # can keep the first and the last tokens alone
    served: bool = False  # answers at a base URL
    gguf: bool = False  # runs .gguf files and nothing else
    # Memory: the cache as it lies there, what is taken beside weights and cache, what lies elsewhere.
    cache_types: tuple[CacheType, ...] = ()  # the first is its own choice
    cells: Callable[[int, int | None, int], int] = whole_context  # (context, window, chunk) -> tokens of one cache
    slides: Callable[[Geometry], bool] = lambda geometry: True  # whether sliding layers cache their window alone
    prefill_tokens: Callable[[Card], int] = lambda card: 0  # of one step, which sliding layers hold too
    overhead: Callable[[Load], Overhead] = lambda load: Overhead(0, 0)
    memory_share: float = 1.0  # of a card's memory that it takes
    takes_all: bool = False  # a server takes its share whole: what is left is cache
    embedding_on_card: bool = True
    offload: OffloadRule | None = None
    # (geometry, columns to a scale, cards) -> why cards cannot share each layer; None: they take turns with theirs
    split_faults: Callable[[Geometry, int, int], list[str]] | None = None
    efficiency: Efficiency = Efficiency(1.0, 1.0, 1.0, 0.0, 0.0)
    # What it loads, and how it is started.
    command: Callable[[Serving], str] = lambda serving: ""  # of what is no server
    launch: Callable[[Serving], Launch] | None = None  # of a server
    served_dtype: Callable[[Serving], str] = lambda serving: serving.served_dtype  # of a server's activations
    program: str = ""  # the server's, as it is found on PATH
    module: str = ""  # what `python -m` starts it with, where no program of its name is there
    package: str = ""  # that this module is of
    health: str = "/health"  # where it says 200 once it can answer
    block: int = 1  # tokens to a block of the cache, the unit in which prompts share it
    shares: bool = True  # whether prompts that begin alike hold that beginning once
    spare_blocks: int = 0  # of the cache, which it keeps for itself
    untried: str = ""  # why nobody ran its command here
    load: Callable[[Download], list[tuple[str, str]]] = lambda download: []  # blocks of a card: (text, language)
    refuses_card: Callable[[Card], str] = lambda card: ""
    refuses_model: Callable[[Mapping[str, Any]], list[str]] = lambda config: []  # config.json -> why not
    needs_beside: Callable[[Mapping[str, Any]], str] = lambda config: ""  # config.json -> what to install beside it
    metrics: Metrics | None = None  # None: it has no such page
    image: str = ""  # the container that runs it, pinned
    command_in_image: tuple[str, ...] = ()  # leading words of ``command`` that the image says itself
    bench: tuple[str, ...] = ()  # its own program that loads a server
    bundle: tuple[str, ...] = ()  # files beside an artifact that suit it (qtool.bundle.table)
    refuses_gguf: str = ""  # why it loads no folder with a .gguf file, where there is more to say

    processor: EngineFacts | None = None  # the facts where a processor computes

    def on(self, card: Card) -> EngineFacts:
        """The facts on this kind of card."""
        return self.processor if self.processor is not None and card.processor else self

    def typed(self, serving: Serving) -> str:
        """What is typed to load or to serve it."""
        return self.launch(serving).text if self.launch else self.command(serving)

    def lacks(self, condition: Condition) -> str:
        """Why a model cannot be judged under a condition here, with what can be; "" where it can."""
        known = ", ".join(kind.name for kind in self.judged_caches)
        if condition.cache and condition.cache not in [kind.name for kind in self.judged_caches]:
            has = f"it has {known}" if known else "its caches are chosen where it is started"
            return f"engine {self.name} keeps no cache of {condition.cache}; {has}"
        if condition.recent and not self.rolls:
            return f"engine {self.name} rolls no window; take engine reference or transformers"
        return ""

    def said(self, condition: Condition) -> str:
        """A condition as scorecards name it."""
        simulated = ", simulated" if condition.cache and self.simulates else ""
        return condition.name + simulated

    def cache_type(self, name: str) -> CacheType | None:
        """None for a type that it does not have."""
        return next((known for known in self.cache_types if known.name == name), None)
