"""What a task cannot tell: one that the source solves nothing of, one that every model solves, one whose whole score is
less than the loss that a gate allows. No loss can be shown there, so that "no loss is shown" would mislead."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.runs.summary import ModelSummary, Summary, TaskSummary

WORD = "uninformative"


def uninformative(counts: Sequence[Sequence[int]], samples: int) -> str:
    """Why a task tells nothing of a loss, "" where it may. ``counts``: for each model, the source first, how many of
    its ``samples`` answers to each problem were right."""
    source = counts[0]
    if not any(source):
        return f"{WORD}: the source solves 0 of {len(source):,}"
    if all(count == samples for one in counts for count in one):
        return f"{WORD}: every model solves {len(source):,} of {len(source):,}"
    return ""


def of_task(summary: Summary, task: str) -> str:
    """As `uninformative`, of the source and all models that were asked."""
    source = summary.models.get("source", ModelSummary()).tasks.get(task)
    if source is None:
        return ""
    others = [model.tasks.get(task) for name, model in summary.models.items() if name != "source"]
    return uninformative([_counts(source), *(_counts(other) for other in others if other is not None)], source.samples)


def too_low_for(source: TaskSummary, limit: float) -> str:
    """Why a gate of ``limit`` points could not fail here, "" where it could: the source has fewer points to lose."""
    score = 100 * source.rate.estimate
    if score and score <= limit:
        return f"{WORD}: the source's whole score, {score:.1f} points, is within max_drop {limit:g}"
    return ""


def _counts(task: TaskSummary) -> list[int]:
    return list(task.solved.values())
