"""What a recipe says of measuring, judging and publishing. These sections know no method: whoever judges a stored run
loads nothing that computes."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qtool.convert.text.source import TextSource
from qtool.evaluate.engines.table import ENGINES, PROBES
from qtool.quantize.methods.number import Number
from qtool.recipe.checking import load

# strict: YAML knows numbers, so that `samples: yes` and "64" are mistakes, not 1 and 64
Length = Annotated[int, Field(ge=8, le=10**7, strict=True)]
Positive = Annotated[int, Field(gt=0, le=10**6, strict=True)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
Text = Annotated[str, Field(min_length=1, max_length=4000)]  # a path, a name, an address
HOUR = 3600.0

if TYPE_CHECKING:  # a Literal, whose faults `recipe.faults` tells, but mypy wants its values spelt out
    EngineName = str
    ServerName = str
else:
    EngineName = Literal[tuple(ENGINES)]
    ServerName = Literal[tuple(PROBES)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TaskSection(Section):
    """One coding task: a name (a shipped one or a benchmark's) or a file; ``limit`` picks evenly over levels.

    ``file`` is a local copy of a benchmark in its published format, ``revision`` another commit of its data set;
    ``after`` and ``before`` (both days included) are LiveCodeBench's window of contest dates."""

    task: Text
    file: Text | None = None
    revision: str | None = None
    after: date | None = None
    before: date | None = None
    limit: Positive | None = None


class FidelitySection(Section):
    """`text:` held-out text for perplexity and KL: as for calibration, but ``length`` may list several window lengths;
    gates judge the first. ``samples`` windows of the shortest, and of a longer one as many as hold no more tokens.
    ``by_layer``: also the KL of each layer alone (one more pass over the first length for every layer)."""

    text: Text
    split: str = "train"
    revision: str | None = None
    column: str | None = None
    samples: Positive = 128
    length: Length | Annotated[tuple[Length, ...], Field(min_length=1)] = 512
    seed: Seed = 0
    by_layer: bool = False

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
    """`evaluate:` what source and artifacts are asked, identically.

    Greedy unless ``temperature`` is given; ``samples`` answers a problem then estimate pass@k. ``base_url`` and
    ``models`` (source or output -> name there) belong to engine openai; its key is OPENAI_API_KEY's.
    """

    tasks: tuple[TaskSection, ...] = ()
    text: FidelitySection | None = None
    engine: EngineName = "reference"
    base_url: str | None = None
    models: dict[str, str] = {}
    samples: Positive = 1
    temperature: Annotated[Number, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    seed: Seed = 0
    prompt: Literal["auto", "completion", "chat"] = "auto"
    max_new_tokens: Positive = 384
    batch_size: Positive = 32
    timeout: Annotated[Number, Field(gt=0, le=HOUR)] = 5.0  # seconds of one program
    sandbox: Literal["auto", "none"] = "auto"

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
        return self


class GateSection(Section):
    """One condition an output must meet; ``output`` and ``task`` omitted mean every one. max_drop in points (1 % of the
    problems), max_kld in nats per token, max_size in GB, min_bits_saved in bits per weight against the
    source; served: a server that it was proved in."""

    output: str | None = None
    task: str | None = None
    max_drop: Annotated[Number, Field(ge=0, le=100)] | None = None
    min_recovery: Annotated[Number, Field(gt=0, le=2)] | None = None
    max_kld: Annotated[Number, Field(gt=0)] | None = None
    max_size: Annotated[Number, Field(gt=0)] | None = None
    min_bits_saved: Annotated[Number, Field(gt=0, lt=64)] | None = None
    served: ServerName | None = None
    on_undecided: Literal["warn", "fail"] = "warn"

    @model_validator(mode="after")
    def _one_condition(self) -> GateSection:
        given = [self.max_drop, self.min_recovery, self.max_kld, self.max_size, self.min_bits_saved, self.served]
        if sum(value is not None for value in given) != 1:
            raise ValueError(
                "a gate states exactly one of max_drop, min_recovery, max_kld, max_size, min_bits_saved, served"
            )
        return self


class MeasureSection(Section):
    """`measure:` memory and speed of source and outputs on this machine, each in a process of its own. ``context``:
    tokens of a prompt; ``batch``: requests at once; ``tokens`` are generated for each; ``price``: of an hour."""

    context: Positive | Annotated[tuple[Positive, ...], Field(min_length=1)] = 2048
    batch: Positive | Annotated[tuple[Positive, ...], Field(min_length=1)] = 1
    tokens: Annotated[int, Field(ge=2, le=10**6)] = 64
    repeats: Positive = 3
    price: Annotated[Number, Field(ge=0)] | None = None

    @property
    def contexts(self) -> tuple[int, ...]:
        """In the recipe's order."""
        return self.context if isinstance(self.context, tuple) else (self.context,)

    @property
    def batches(self) -> tuple[int, ...]:
        """In the recipe's order."""
        return self.batch if isinstance(self.batch, tuple) else (self.batch,)


class ServeSection(Section):
    """`serve:` real servers that each output is started in and proved, those that read its format; with ``users`` at
    once of ``context`` tokens (None: the most that fits), in ``dtype`` (None: as its files say)."""

    prove: Annotated[tuple[ServerName, ...], Field(min_length=1)]
    context: Positive | None = None
    users: Annotated[int, Field(gt=0, le=4096, strict=True)] = 4
    dtype: Literal["float16", "bfloat16"] | None = None


class BenchmarkSection(Section):
    """A data set that the Hub registers as a benchmark, and the task's id there."""

    dataset: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    task: str


class PublishSection(Section):
    """`publish:` where finished outputs go. ``to``: an organization, or a repository's name with {model}, {output},
    {format}; ``layout``: a repository for each output, or one with a folder for each. The licence and ``base_model``
    are the source's own; name them only where its card does not."""

    to: Annotated[str, Field(pattern=r"^[\w{][\w.{}-]*(/[\w{][\w.{}-]*)?$")]
    layout: Literal["repository", "folders"] = "repository"
    private: bool = False
    revision: str | None = None
    pr: bool = False
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    benchmarks: dict[str, BenchmarkSection] = {}


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
