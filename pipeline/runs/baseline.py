"""Scores as two models are compared: which problems a model solved, and its loss window by window.

They come from a run, from an evaluation, or from a baseline file kept beside the code.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from qtool import QtoolError
from qtool.convert.files.reading import CONFIG_LIMIT, read_bytes
from qtool.evaluate.scorecard import Settings
from qtool.recipe.judging import EvaluateSection
from qtool.runs.along import AlongSummary
from qtool.runs.record import LOCK, load_index, load_run, load_summary
from qtool.runs.summary import ModelSummary, TaskSummary, TextSummary


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class TaskResult(_File):
    """How many of the samples solved each problem."""

    digest: str
    settings: Settings
    samples: int
    solved: dict[str, int]


class TextResult(_File):
    """KL to the source and negative log-likelihood (nats a token), one number for each window."""

    digest: str
    settings: Settings
    kl: list[float]
    nll: list[float]


class Measured(_File):
    """One model's scores; ``texts`` by window length, ``along`` of a long text by condition ("": none) and bucket, a
    number for each block. ``key`` says which model; sizes are None where it is not qtool's."""

    key: str
    nbytes: PositiveInt | None
    bits_per_weight: float | None
    tasks: dict[str, TaskResult]
    texts: dict[int, TextResult]
    along: dict[str, dict[str, TextResult]] = {}


class Baseline(_File):
    """All models of a run; ``source`` is the key of the model that the KLs refer to, ``asked`` what a recipe asked."""

    qtool: str
    model: str
    run: str
    source: str | None
    subjects: dict[str, Measured]
    asked: EvaluateSection | None = None


def measured(folder: Path) -> Baseline:
    """What the run or evaluation in ``folder`` measured. Raises QtoolError when it holds no scores."""
    from importlib.metadata import version

    index = load_index(folder)
    record = load_run(folder) if (folder / LOCK).exists() else None
    models = (record.summary if record else load_summary(folder)).models
    subjects = {name: _model(key, models.get(name, ModelSummary())) for name, key in index.subjects.items()}
    made = record.lock.versions.get("qtool-llm", "") if record else version("qtool-llm")
    return Baseline(
        qtool=made, model=record.lock.source.model if record else folder.name, run=folder.name,
        source=index.subjects.get("source"), subjects=subjects, asked=record.recipe.evaluate if record else None,
    )  # fmt: skip


def save_baseline(baseline: Baseline, path: Path) -> None:
    """Small JSON without answers. Raises QtoolError when the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(baseline.model_dump_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise QtoolError(f"{path}: cannot be written: {error.strerror}.") from error


def load_baseline(path: Path) -> Baseline:
    """Raises QtoolError for a file that is absent or is no baseline."""
    if not os.path.lexists(path):
        raise QtoolError(f"{path}: no such file. `qtool baseline save RUN FILE` writes a baseline.")
    try:
        return Baseline.model_validate_json(read_bytes(path, CONFIG_LIMIT))
    except ValidationError as error:
        raise QtoolError(f"{path}: not a baseline that this qtool reads; save it anew.") from error


def _model(key: str, model: ModelSummary) -> Measured:
    tasks = {label: _task(found) for label, found in model.tasks.items()}
    texts = {length: _text(found) for length, found in model.texts.items()}
    along = {condition: _along(found) for condition, found in model.along.items()}
    nbytes, bits = (model.size.tensors, model.size.bits_per_weight) if model.size else (None, None)
    return Measured(key=key, nbytes=nbytes, bits_per_weight=bits, tasks=tasks, texts=texts, along=along)


def _task(score: TaskSummary) -> TaskResult:
    return TaskResult(digest=score.digest, settings=score.settings, samples=score.samples, solved=score.solved)


def _text(score: TextSummary) -> TextResult:
    return TextResult(digest=score.digest, settings=score.settings, kl=score.kls, nll=score.nlls)


def _along(score: AlongSummary) -> dict[str, TextResult]:
    """By bucket."""
    return {
        bucket.name: TextResult(
            digest=score.digest, settings=score.settings, kl=score.kls[score.blocks(bucket)],
            nll=score.nlls[score.blocks(bucket)],
        )
        for bucket in score.buckets
    }  # fmt: skip
