"""A finished run in the tools that teams keep their experiments in: MLflow, Weights & Biases, trackio.

Each model of the run becomes a run there: its scores as metrics, with the ends of their 95 % intervals under names of
their own (`heldout`, `heldout.low`, `heldout.high`), its settings as parameters, the report as a file. Each tool has
its own package, which decides where all this goes, by its own environment variables.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.evaluate.statistics import Interval
from qtool.runs.evidence import task_label
from qtool.runs.record import RunRecord
from qtool.runs.summary import ModelSummary

_UNUSUAL = re.compile(r"[^A-Za-z0-9_.\- /]+")  # what MLflow takes in no name


@dataclass(frozen=True)
class Tracked:
    """One model of a run. ``group``: the run's id, the same for all of its models."""

    project: str
    name: str
    group: str
    metrics: Mapping[str, float]
    parameters: Mapping[str, str]
    report: Path


def tracked(run: RunRecord, project: str, report: Path) -> list[Tracked]:
    """Every model of the run that has numbers."""
    found = []
    for name, model in run.summary.models.items():
        metrics = metrics_of(model)
        if not metrics:
            continue
        manifest = run.manifests.get(name)
        settings = manifest.output if manifest else {}
        parameters = {key: str(value) for key, value in settings.items() if value not in (None, "", [], {})}
        parameters |= {"model": run.lock.source.name, "commit": run.lock.source.commit, "device": run.lock.device}
        found.append(Tracked(project, f"{run.lock.source.name}-{name}", run.folder.name, metrics, parameters, report))
    return found


def metrics_of(model: ModelSummary) -> dict[str, float]:
    """Name -> number, those that are finite: sizes in bytes, KL in nats a token, shares of problems as fractions,
    losses in points."""
    found: dict[str, float] = {}
    if model.size is not None:
        found |= {"size_bytes": float(model.size.tensors), "bits_per_weight": model.size.bits_per_weight}
    for length, text in model.texts.items():
        at = "" if text is model.text else f".{length}"
        found |= {f"perplexity{at}": text.perplexity.estimate, **_of(f"kl{at}", text.kl), f"top1{at}": text.top1}
    for task, score in model.tasks.items():
        label = task_label(task)
        found |= _of(label, score.rate)
        if score.loss is not None:
            found |= _of(f"{label}.points_lost", score.loss.difference.loss) | {f"{label}.p_holm": score.loss.p_holm}
    return {_UNUSUAL.sub("_", name): value for name, value in found.items() if math.isfinite(value)}


def _of(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.estimate, f"{name}.low": interval.low, f"{name}.high": interval.high}


def _package(name: str) -> Any:
    """Raises QtoolError (exit 3) with the command that installs it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise QtoolError(f"{name} is not installed here. Run: pip install {name}", exit_code=3) from error


def _mlflow(one: Tracked) -> str:
    """Into MLFLOW_TRACKING_URI, or where MLflow goes by itself."""
    mlflow = _package("mlflow")
    mlflow.set_experiment(one.project)
    with mlflow.start_run(run_name=one.name, tags={"qtool.run": one.group}):
        mlflow.log_params({key: value[:500] for key, value in one.parameters.items()})
        mlflow.log_metrics(dict(one.metrics))
        mlflow.log_artifact(str(one.report))
    return str(mlflow.get_tracking_uri())


def _wandb(one: Tracked) -> str:
    """Offline, into ./wandb, unless WANDB_MODE says otherwise; `wandb sync` sends it."""
    wandb = _package("wandb")
    mode = os.environ.get("WANDB_MODE", "offline")
    with wandb.init(
        project=one.project, name=one.name, group=one.group, config=dict(one.parameters), mode=mode,
        reinit="finish_previous",
    ) as begun:  # fmt: skip
        begun.log(dict(one.metrics))
        report = wandb.Artifact(f"report-{one.group}", type="report")
        report.add_file(str(one.report))
        begun.log_artifact(report)
        return str(begun.dir)


def _trackio(one: Tracked) -> str:
    """Into trackio's own folder, which TRACKIO_DIR names."""
    trackio = _package("trackio")
    trackio.init(project=one.project, name=one.name, group=one.group, config=dict(one.parameters), embed=False)
    trackio.log(dict(one.metrics))
    trackio.log_artifact(str(one.report), name=f"report-{one.group}", type="report")
    trackio.finish()
    return f"trackio project {one.project}"


TRACKERS: dict[str, Callable[[Tracked], str]] = {"mlflow": _mlflow, "wandb": _wandb, "trackio": _trackio}
"""Name of a tool -> what puts a model there and says where that is."""


def track(run: RunRecord, tool: str, project: str, report: Path) -> list[tuple[str, str]]:
    """(model, where it went). Raises QtoolError (exit 3) where the tool's package is missing or cannot write."""
    where = []
    for one in tracked(run, project, report):
        try:
            where.append((one.name, TRACKERS[tool](one)))
        except QtoolError:
            raise
        except Exception as error:  # whatever the tool raises is its answer
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise QtoolError(f"{tool} does not take {one.name}: {said[0]}", exit_code=3) from error
    return where
