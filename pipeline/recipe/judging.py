"""What a recipe says of measuring, judging and publishing. These sections know no method: whoever judges a stored run
loads nothing that computes."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from qtool.convert.text.source import TextSource
from qtool.evaluate.buckets import bucket_name, buckets_of
from qtool.evaluate.engines.table import ENGINES, PROBES
from qtool.quantize.methods.number import Number
from qtool.recipe.checking import load
from qtool.recipe.long import ConditionSection, LongGate, LongSection, MadeSection
from qtool.recipe.section import Length, Positive, Section, Seed, Text, TextSection

HOUR = 3600.0

if TYPE_CHECKING:  # a Literal, whose faults `recipe.faults` tells, but mypy wants its values spelt out
    EngineName = str
    ServerName = str
else:
    EngineName = Literal[tuple(ENGINES)]
    ServerName = Literal[tuple(PROBES)]


class TaskSection(Section):
    """One coding task."""

    later = frozenset({"made"})

    task: Text
    """A task that ships (`handwritten`, `heldout`), a benchmark (`humaneval+`, `mbpp+`, …), or a file of problems."""
    file: Text | None = None
    """A local copy of a benchmark, in the format in which it is published."""
    revision: str | None = None
    """Another commit of the benchmark's data set."""
    after: date | None = None
    """LiveCodeBench: contests from this day on, `2025-01-31`."""
    before: date | None = None
    """LiveCodeBench: contests up to this day."""
    limit: Positive | None = None
    """At most so many problems, evenly over levels of difficulty."""
    made: MadeSection | None = None
    """How the problems of a task are made that are in no file."""

    @model_validator(mode="after")
    def _made(self) -> TaskSection:
        if self.made is not None:
            from qtool.evaluate.tasks.table import made  # every benchmark, of which few recipes say more than a name

            if self.task not in made():
                raise ValueError(f"`made:` is for the tasks {', '.join(made())}; {self.task} has problems of its own")
        return self


class FidelitySection(TextSection):
    """`text:` held-out text for perplexity and KL."""

    text: Text
    """Held-out text: `heldout-code`, a file, or a data set of the Hub. Not the calibration text."""
    samples: Positive = 128
    """Windows of the shortest length; of a longer one as many as hold no more tokens."""
    length: Length | Annotated[tuple[Length, ...], Field(min_length=1)] = 512
    """Tokens of a window, or a list of lengths; gates judge the first."""
    seed: Seed = 0
    """Which windows are drawn."""
    by_layer: bool = False
    """Also the KL of each layer alone: one more pass for every layer."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """In the recipe's order, each once."""
        return tuple(dict.fromkeys(self.length if isinstance(self.length, tuple) else (self.length,)))

    def source(self, length: int) -> TextSource:
        """The windows of one length."""
        return TextSource(
            text=self.text, split=self.split, revision=self.revision, column=self.column, seed=self.seed,
            length=length, samples=max(1, self.samples * min(self.lengths) // length),
        )  # fmt: skip


class EvaluateSection(Section):
    """`evaluate:` what source and artifacts are asked, identically."""

    later = frozenset({"long", "conditions"})

    tasks: tuple[TaskSection, ...] = ()
    """Coding tasks."""
    text: FidelitySection | None = None
    """Held-out text for perplexity and KL."""
    long: LongSection | None = None
    """One long text: KL, agreement and perplexity by position."""
    conditions: tuple[ConditionSection, ...] = ()
    """Other ways to keep keys and values: the tasks and the long text are put again under each."""
    engine: EngineName = "reference"
    """What computes the answers."""
    base_url: str | None = None
    """Engine `openai`: the server's address, which ends in /v1. Its key is OPENAI_API_KEY's."""
    models: dict[str, str] = Field(default_factory=dict)
    """Engine `openai`: `source` or an output's name -> what the server calls it."""
    samples: Positive = 1
    """Answers to a problem; with several, pass@k is estimated."""
    temperature: Annotated[Number, Field(ge=0, le=100)] = 0.0
    """0 takes the likeliest token."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Tokens are drawn from the likeliest that together are so probable."""
    seed: Seed = 0
    """Of drawn answers."""
    prompt: Literal["auto", "completion", "chat"] = "auto"
    """How a problem is put: `auto` takes the chat template where the model has one."""
    max_new_tokens: Positive = 384
    """Of an answer, at most."""
    batch_size: Positive = 32
    """Problems answered at once, or requests to a server."""
    timeout: Annotated[Number, Field(gt=0, le=HOUR)] = 5.0  # seconds of one program
    """Seconds a judged program may take."""
    sandbox: Literal["auto", "none"] = "auto"
    """`none` runs judged programs unprotected."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateSection:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples: {self.samples} with temperature 0 would be one answer; set `temperature: 0.8`")
        if 0 < self.temperature < 0.001:
            raise ValueError("`temperature:` below 0.001 is not drawing; 0 takes the likeliest token")
        if ENGINES[self.engine].facts.served != (self.base_url is not None):
            raise ValueError("`base_url:` and `engine: openai` go together")
        if self.base_url is not None and "@" in self.base_url:
            raise ValueError("`base_url:` holds a password; put the server's key into OPENAI_API_KEY")
        if self.text is not None and not ENGINES[self.engine].facts.logits:
            raise ValueError(
                f"perplexity and KL need all logits, which engine {self.engine} does not give; leave out `text:` or "
                "take engine reference"
            )
        if self.long is not None and not ENGINES[self.engine].facts.layered:
            raise ValueError(
                f"a long text is read layer by layer, which engine {self.engine} does not do; leave out `long:` or "
                "take engine reference"
            )
        if self.conditions and self.long is None and not self.tasks:
            raise ValueError("`conditions:` put `long:` and `tasks:` again, and neither is there")
        names = [asked.condition.name for asked in self.conditions]
        for asked in self.conditions:
            if lack := ENGINES[self.engine].facts.lacks(asked.condition):
                raise ValueError(f"`conditions:` {lack}")
            if names.count(asked.condition.name) > 1:
                raise ValueError(f"`conditions:` says {asked.condition.name} twice")
        return self


class GateSection(Section):
    """One condition that an output must meet."""

    output: str | None = None
    """The output that must keep it; left out: each."""
    task: str | None = None
    """The task it is about, for `max_drop` and `min_recovery`; left out: each."""
    max_drop: Annotated[Number, Field(ge=0, le=100)] | None = None
    """Points that the score may fall below the source's; 1 point is 1 % of the problems."""
    min_recovery: Annotated[Number, Field(gt=0, le=2)] | None = None
    """Score as a part of the source's, 0.98."""
    max_kld: Annotated[Number, Field(gt=0)] | None = None
    """Mean KL to the source, nats a token."""
    long: LongGate | None = None
    """Of the long text, for `max_kld`: a bucket (`64K-128K`) or all of it, under a condition or none."""
    max_size: Annotated[Number, Field(gt=0)] | None = None
    """GB (1e9 bytes) of the artifact's files."""
    min_bits_saved: Annotated[Number, Field(gt=0, lt=64)] | None = None
    """Bits a weight below the source's."""
    served: ServerName | None = None
    """A server that the artifact was proved in (`serve:`)."""
    on_undecided: Literal["warn", "fail"] = "warn"
    """What an interval that includes the limit is: a warning, or a failure."""

    @model_validator(mode="after")
    def _one_condition(self) -> GateSection:
        given = [self.max_drop, self.min_recovery, self.max_kld, self.max_size, self.min_bits_saved, self.served]
        if sum(value is not None for value in given) != 1:
            raise ValueError(
                "a gate states exactly one of max_drop, min_recovery, max_kld, max_size, min_bits_saved, served"
            )
        if self.long is not None and self.max_kld is None:
            raise ValueError("`long:` of a gate goes with `max_kld:`")
        return self

    def fault(self, evaluate: EvaluateSection) -> str:
        """Why `evaluate:` gives it nothing to judge by; "" where it does."""
        if self.task not in (None, *(task.task for task in evaluate.tasks)):
            return f"a gate names task {self.task!r}, which `evaluate:` does not run"
        if self.long is None:
            return ""
        if evaluate.long is None:
            return "a gate is about the long text, and `evaluate:` has no `long:`"
        buckets = [bucket_name(*bucket) for bucket in buckets_of(evaluate.long.length)]
        if self.long.bucket not in (None, *buckets):
            return f"a gate names bucket {self.long.bucket!r}; the long text has {', '.join(buckets)}"
        known = {asked.condition.name for asked in evaluate.conditions}
        if (name := self.long.condition.name) and name not in known:
            has = f"has {', '.join(sorted(known))}" if known else "is not there"
            return f"a gate is about {name}, and `conditions:` {has}"
        return ""


class MeasureSection(Section):
    """`measure:` memory and speed of source and outputs on this machine, each in a process of its own."""

    context: Positive | Annotated[tuple[Positive, ...], Field(min_length=1)] = 2048
    """Tokens of a prompt, or a list."""
    batch: Positive | Annotated[tuple[Positive, ...], Field(min_length=1)] = 1
    """Requests at once, or a list."""
    tokens: Annotated[int, Field(ge=2, le=10**6)] = 64
    """Generated for each request."""
    repeats: Positive = 3
    """Medians are taken of so many."""
    price: Annotated[Number, Field(ge=0)] | None = None
    """Of an hour of this machine: a million tokens' cost."""

    @property
    def contexts(self) -> tuple[int, ...]:
        """In the recipe's order."""
        return self.context if isinstance(self.context, tuple) else (self.context,)

    @property
    def batches(self) -> tuple[int, ...]:
        """In the recipe's order."""
        return self.batch if isinstance(self.batch, tuple) else (self.batch,)


class ServeSection(Section):
    """`serve:` real servers that each output is started in and proved, those that read its format."""

    prove: Annotated[tuple[ServerName, ...], Field(min_length=1)]
    """Servers in which each output is started and held against the reference."""
    context: Positive | None = None
    """Tokens of each user; left out: the most that fits."""
    users: Annotated[int, Field(gt=0, le=4096, strict=True)] = 4
    """At once."""
    dtype: Literal["float16", "bfloat16"] | None = None
    """What the server computes in; left out: as the files say."""


class BenchmarkSection(Section):
    """A data set that the Hub registers as a benchmark, and the task's id there."""

    dataset: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """The data set that the Hub registers as a benchmark, ORG/NAME."""
    task: str
    """The task's id there."""


class PublishSection(Section):
    """`publish:` where finished outputs go. Licence and base model are the source's own; name them only where its card
    does not."""

    to: Annotated[str, Field(pattern=r"^[\w{][\w.{}-]*(/[\w{][\w.{}-]*)?$")]
    """An organization, or a repository's name with {model}, {output}, {format}."""
    layout: Literal["repository", "folders"] = "repository"
    """A repository for each output, or one with a folder for each."""
    private: bool = False
    """Whether new repositories are private."""
    revision: str | None = None
    """A branch of the repository."""
    pr: bool = False
    """Open a pull request."""
    license: str | None = None
    """Of the source, where its card names none."""
    license_name: str | None = None
    """Of a licence that the Hub does not know."""
    license_link: str | None = None
    """Where that licence stands."""
    base_model: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """The source's name on the Hub, where it is a folder here."""
    benchmarks: dict[str, BenchmarkSection] = Field(default_factory=dict)
    """Task -> the benchmark of the Hub that it is."""


class Judging(Section):
    """The recipe of a finished run, as far as it is still asked: what made the artifacts was checked before they were
    made, and is in their manifests."""

    model: Any
    outputs: Any
    calibration: Any = None
    output_dir: Any = None
    evaluate: EvaluateSection = EvaluateSection()
    measure: MeasureSection | None = None
    serve: ServeSection | None = None
    gates: tuple[GateSection, ...] = ()
    publish: PublishSection | None = None


def load_judging(path: Path) -> Judging:
    """Of a run's own recipe. Raises QtoolError listing every fault with its path in the file."""
    return load(path, Judging)
