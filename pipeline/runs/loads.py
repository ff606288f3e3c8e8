"""What `qtool measure --concurrency` and `--rate` found, as the ledger keeps it: numbers only, one level a load."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from qtool.runs import ledger

KIND = "load"


@dataclass(frozen=True)
class Slo:
    """What an answer must keep: seconds to the first token, and to each further one; None: as long as it likes."""

    first: float | None = None
    step: float | None = None


@dataclass(frozen=True)
class Level:
    """One load. ``users``: of a closed loop; ``rate``: requests a second of an open one. ``faults``: what was said ->
    how often; ``failed`` is their sum. ``first``, ``step`` and ``whole`` (the answer's end): seconds at p50, p95, p99,
    None where a request that failed lies there: failed ones are infinitely slow. ``good``: requests a second that kept
    the objective; ``keeps``: whether the p95 did, None without one. ``in_flight``: requests under way on average;
    ``late``: seconds from a request's planned arrival to its sending, at p95. ``hits``, ``preempted``: of the server's
    own metrics, None where it has none. ``step_bound``, ``first_bound``: seconds, (best, slow) of the plan at this many
    requests. ``wrong``: why the figures cannot be right."""

    users: int | None
    rate: float | None
    requests: int
    failed: int
    faults: dict[str, int]
    wall: float
    first: dict[str, float | None]
    step: dict[str, float | None]
    whole: dict[str, float | None]
    tokens_per_second: float
    requests_per_second: float
    good: float
    keeps: bool | None
    in_flight: float
    late: float
    cached: float | None = None
    hits: float | None = None
    preempted: float | None = None
    step_bound: tuple[float, float | None] | None = None
    first_bound: tuple[float, float | None] | None = None
    wrong: str = ""

    @property
    def name(self) -> str:
        """`8 users`, `2.5 /s`."""
        if self.users is None:
            return f"{self.rate:g} /s"
        return f"{self.users} user{'s' if self.users > 1 else ''}"


@dataclass(frozen=True)
class Load:
    """``prompt`` tokens of each request, the first ``shared`` of them the same in all; ``tokens`` answered."""

    url: str
    model: str
    engine: str
    prompt: int
    shared: int
    tokens: int
    seed: int
    slo: Slo
    time: str
    levels: tuple[Level, ...]

    @property
    def largest(self) -> Level | None:
        """The closed level with the most users whose p95 keeps the objective, as those with fewer users do."""
        best = None
        for level in sorted((lv for lv in self.levels if lv.users is not None), key=lambda lv: lv.users or 0):
            if not level.keeps:
                break
            best = level
        return best

    def as_json(self) -> dict[str, Any]:
        """As the ledger keeps it."""
        return {"kind": KIND} | asdict(self)


_READER: TypeAdapter[Load] = TypeAdapter(Load)


def from_json(entry: dict[str, Any]) -> Load:
    """What `as_json` wrote. Raises ValueError for anything else."""
    return _READER.validate_python({key: value for key, value in entry.items() if key != "kind"})


def log(runs: Path, load: Load) -> None:
    """A line in the ledger."""
    ledger.append(runs, load.as_json())
