"""What an evaluation leaves behind: the outcome of every problem, so that two scorecards can be paired."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

from qtool.convert.files.durable import save as save

Grade = Literal["passed", "failed", "timeout", "error"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Settings(_Record):
    """How a model was asked. ``version`` names the engine's packages; ``seed`` is None for greedy decoding. ``noise``:
    how sampled tokens are drawn, where that is not the engine's own way."""

    engine: str
    version: str = ""
    dtype: str
    device: str
    prompt: str
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    condition: str = ""  # of the cache: its type and its window, where it is not the engine's own and whole
    noise: str = ""

    @model_serializer(mode="wrap")
    def _as_asked(self, others: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Scores are known by this: what says nothing is left out, so that those made before it existed stay known."""
        unsaid = {name for name in ("condition", "noise") if not getattr(self, name)}
        return {name: value for name, value in others(self).items() if name not in unsaid}

    def differences(self, other: Settings, but: Collection[str] = ()) -> list[str]:
        """What forbids pairing two scores, in words; empty when they may be paired. Versions, seeds and the settings
        named in ``but`` may differ."""
        mine, theirs = dict(self), dict(other)
        return [
            f"{name} {mine[name]} and {theirs[name]}"
            for name in mine
            if name not in ("version", "seed", *but) and mine[name] != theirs[name]
        ]


class ProblemOutcome(_Record):
    """One answer to one problem: what the model wrote and what became of it."""

    outcome: Grade
    detail: str
    completion: str


class TaskScore(_Record):
    """One model on one task. ``key`` names model, problems and settings together.

    ``outcomes`` holds each problem's first answer, ``more`` the further ``samples - 1`` of each.
    """

    key: str
    subject: str
    task: str
    digest: str
    settings: Settings
    sandbox: str
    source: str = ""  # where the problems came from
    left_out: dict[str, str] = {}  # the benchmark's problems that were not asked, and why
    in_process: int = 0  # problems whose program shared a process with its test, and so could have cheated it
    seconds: float
    outcomes: dict[str, ProblemOutcome]
    samples: int = 1
    more: dict[str, tuple[ProblemOutcome, ...]] = {}
    groups: dict[str, dict[str, str]] = {}  # problem -> what the task says of it: its difficulty, its category

    @model_validator(mode="after")
    def _whole(self) -> TaskScore:
        expected = set(self.outcomes) if self.samples > 1 else set()
        if not self.outcomes:
            raise ValueError("`outcomes` must hold an answer to every problem")
        if set(self.more) != expected or any(len(rest) != self.samples - 1 for rest in self.more.values()):
            raise ValueError(f"`more` must hold {self.samples - 1} further answers to every problem")
        return self

    def fault(self, problems: Collection[str]) -> str:
        """What is wrong with a stored score of these problems; "" for nothing."""
        if sorted(self.outcomes) != sorted(problems):
            return "it has not the task's problems"
        broken = any(answer.outcome == "error" for name in self.outcomes for answer in self.answers(name))
        return "it holds answers that could not be run" if broken else ""

    def answers(self, problem: str) -> tuple[ProblemOutcome, ...]:
        """All ``samples`` answers to a problem."""
        return (self.outcomes[problem], *self.more.get(problem, ()))

    @property
    def solved(self) -> list[int]:
        """How many of each problem's samples passed, in the order of the task's problems. Raises ValueError if the
        sandbox failed on one: that is no score."""
        answers = [(name, answer) for name in self.outcomes for answer in self.answers(name)]
        broken = [(name, answer.detail) for name, answer in answers if answer.outcome == "error"]
        if broken:
            raise ValueError(f"{len(broken)} answers could not be run ({broken[0][0]}: {broken[0][1]})")
        return [sum(answer.outcome == "passed" for answer in self.answers(name)) for name in self.outcomes]

    @property
    def rates(self) -> list[float]:
        """Share of each problem's samples that passed (their mean is pass@1). Raises ValueError as `solved` does."""
        return [count / self.samples for count in self.solved]

    @property
    def passed(self) -> list[bool]:
        """Which problems were solved. Raises ValueError as `solved` does, and for more than one sample a problem."""
        if self.samples > 1:
            raise ValueError(f"{self.task}: {self.samples} samples a problem have rates, no single outcome")
        return [count == 1 for count in self.solved]


class FidelityScore(_Record):
    """One model against its source on held-out text; ``nll``, ``kl`` and ``top1`` have one number for each window.

    KL(source || model) in nats a token over the source's ``kept`` likeliest tokens and one bucket for the rest: a
    lower bound; 0 = the whole vocabulary, exact. ``context``: tokens a window. ``kl_by_position``: mean over windows of
    consecutive bins of ``position_bin`` tokens. ``kl_by_layer``: mean KL when only that layer is the model's and all
    else is the source's; empty where it was not measured.
    """

    key: str
    subject: str
    digest: str
    settings: Settings
    tokens: int
    nll: list[float]
    kl: list[float]
    top1: list[float]
    kl_p95: float
    kl_p999: float
    kl_by_position: list[float] = []
    position_bin: int = 0
    context: int = 0
    kl_by_layer: list[float] = []
    kept: int = 0

    @model_validator(mode="after")
    def _whole(self) -> FidelityScore:
        if not self.kl or self.fault(len(self.kl)):
            raise ValueError("`nll`, `kl` and `top1` must hold a number for each window")
        return self

    def fault(self, windows: int) -> str:
        """What is wrong with a stored score of so many windows; "" for nothing."""
        whole = all(len(values) == windows for values in (self.nll, self.kl, self.top1))
        return "" if whole else "it has not the text's windows"


class PositionScore(_Record):
    """One model against its source along one text of ``length`` tokens: ``kl`` (to the source with its whole cache),
    ``nll`` and ``top1`` have one number for each ``block`` positions. ``settings.condition``: how this model kept its
    keys and values. ``cache_bytes``: of all layers at the text's end, as a cache of that kind stores them."""

    key: str
    subject: str
    digest: str
    settings: Settings
    length: int
    block: int
    kl: list[float]
    nll: list[float]
    top1: list[float]
    kept: int = 0
    cache_bytes: int
    seconds: float

    @model_validator(mode="after")
    def _whole(self) -> PositionScore:
        blocks = -(-self.length // self.block) if self.block > 0 else 0
        if not blocks or any(len(values) != blocks for values in (self.kl, self.nll, self.top1)):
            raise ValueError("`kl`, `nll` and `top1` must hold a number for each block")
        return self


@dataclass
class Scores:
    """Everything measured: subject name -> task name -> score; subject name -> fidelity at the first window length,
    which gates judge, and at every length; subject name -> condition -> fidelity along a long text."""

    tasks: dict[str, dict[str, TaskScore]] = field(default_factory=dict)
    fidelity: dict[str, FidelityScore] = field(default_factory=dict)
    contexts: dict[str, dict[int, FidelityScore]] = field(default_factory=dict)
    positions: dict[str, dict[str, PositionScore]] = field(default_factory=dict)

    def add_fidelity(self, score: FidelityScore) -> None:
        """The first that comes is the first length's."""
        self.fidelity.setdefault(score.subject, score)
        self.contexts.setdefault(score.subject, {})[score.context] = score

    def add_positions(self, score: PositionScore) -> None:
        """Of one model under one condition."""
        self.positions.setdefault(score.subject, {})[score.settings.condition] = score


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of ``k`` samples drawn from ``n``, of which ``c`` passed, is a passing one: the unbiased
    estimator 1 - C(n-c, k) / C(n, k) of Chen et al. 2021 (arXiv:2107.03374), as a product that cannot overflow.

    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@{k} of {n} samples, {c} of them right, has no meaning")
    missed = 1.0
    for i in range(n - c + 1, n + 1):
        missed *= max(0.0, 1 - k / i)
    return 1 - missed
