"""How many problems show a loss, before they are asked: from the share of outcomes that earlier runs saw change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtool import QtoolError
from qtool.evaluate.statistics import detectable_loss, problems_needed, wilson
from qtool.runs.record import load_summary
from qtool.runs.shelf import entries

ENOUGH = 5  # outcomes that changed: from so many on their share is taken as it is
ASSUMED = 0.1  # of outcomes that a 4-bit artifact changes, where no run tells; the demo: 7 % of 2,000


@dataclass(frozen=True)
class Seen:
    """Outcomes of artifacts that differed from the source's, of all that were asked, one answer to a problem."""

    changed: int = 0
    asked: int = 0

    @property
    def share(self) -> float | None:
        """The share that changed; where hardly any did, the most that it may be (Wilson, 95 %). None where too little
        was seen to say that it is less than what is assumed."""
        if self.changed >= ENOUGH:
            return self.changed / self.asked
        most = wilson(self.changed, self.asked, 0.9).high if self.asked else 1.0
        return most if most < ASSUMED else None

    @property
    def few(self) -> bool:
        """Whether `share` is what it may be at most."""
        return self.changed < ENOUGH


@dataclass(frozen=True)
class TaskPower:
    """A task of so many problems. ``discordance``: the share taken; ``seen``: whether runs on this very task gave it.
    ``shown``: the smallest loss, in points, that all its problems show with 80 % power; None where none."""

    task: str
    problems: int
    discordance: float
    seen: bool
    shown: float | None


def seen_in(runs: Path) -> dict[str, Seen]:
    """Task -> what the finished runs and evaluations in ``runs`` saw of it. Damaged ones are passed over."""
    found: dict[str, Seen] = {}
    for entry in entries(runs):
        try:
            summary = load_summary(entry.folder)
        except QtoolError:
            continue
        for model in summary.models.values():
            for task, score in model.tasks.items():
                if score.loss is not None and score.samples == 1:
                    before, d = found.get(task, Seen()), score.loss.difference
                    found[task] = Seen(before.changed + d.lost + d.gained, before.asked + d.problems)
    return found


def pooled(seen: Mapping[str, Seen]) -> Seen:
    """Over all tasks."""
    return Seen(sum(one.changed for one in seen.values()), sum(one.asked for one in seen.values()))


def power_of(sizes: Mapping[str, int], seen: Mapping[str, Seen], given: float | None) -> list[TaskPower]:
    """Of each task. ``given``: the share to take for all of them."""
    other = pooled(seen).share or ASSUMED
    found = []
    for task, problems in sizes.items():
        own = seen[task].share if task in seen and given is None else None
        share = given if given is not None else own or other
        shown = detectable_loss(round(share * problems), problems, 0.95)
        found.append(TaskPower(task, problems, share, own is not None, shown))
    return found


def needed(points: float, discordances: Sequence[float]) -> list[tuple[float, int]]:
    """(discordance, problems that show a loss of ``points``); of no share below the loss, which changes as many."""
    shares = sorted({max(share, points / 100) for share in discordances})
    return [(share, problems_needed(points, share)) for share in shares]
