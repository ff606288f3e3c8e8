"""What an evaluation leaves behind: the outcome of every problem, so that two scorecards can be paired."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

Outcome = Literal["passed", "failed", "timeout", "error"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Settings(_Record):
    """What two scores must share to be comparable."""

    engine: str
    dtype: str
    device: str
    prompt: str
    max_new_tokens: int


class ProblemOutcome(_Record):
    """One problem: what the model wrote and what became of it."""

    outcome: Outcome
    detail: str
    completion: str


class TaskScore(_Record):
    """One model on one task. ``key`` names model, problems and settings together."""

    key: str
    subject: str
    task: str
    digest: str
    settings: Settings
    sandbox: str
    seconds: float
    outcomes: dict[str, ProblemOutcome]

    @property
    def passed(self) -> list[bool]:
        """In the order of the task's problems. Raises ValueError if the sandbox failed on one: that is no score."""
        broken = [name for name, o in self.outcomes.items() if o.outcome == "error"]
        if broken:
            raise ValueError(
                f"{len(broken)} problems could not be run ({broken[0]}: {self.outcomes[broken[0]].detail})"
            )
        return [o.outcome == "passed" for o in self.outcomes.values()]


class FidelityScore(_Record):
    """One model against its source on held-out text; lists have one number for each window."""

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


def save(path: Path, score: TaskScore | FidelityScore) -> None:
    """Write beside, then rename: a score is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(score.model_dump_json(indent=1) + "\n", encoding="utf-8")
    partial.rename(path)
