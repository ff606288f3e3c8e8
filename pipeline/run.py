"""The straight line: recipe -> source -> plan -> artifacts -> scores -> verdicts -> log."""

from __future__ import annotations

import datetime
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from qtool import QtoolError, ledger
from qtool.convert.artifact import Artifact, write_json
from qtool.convert.checkpoint import Checkpoint
from qtool.convert.skeleton import load_config
from qtool.convert.source import resolve
from qtool.convert.text import load_tokenizer, token_windows
from qtool.convert.verify import Verification, verify
from qtool.gates import GateResult, judge
from qtool.job import Job, device_kind, open_job, versions
from qtool.outputs import make_artifacts, progress_bar
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods import Method
from qtool.recipe import EvaluateSection, Recipe, digest_of, load_recipe
from qtool.scores import Evaluation, Scores, Subject, artifact_subject, source_subject


@dataclass(frozen=True)
class Run:
    """What a finished run knows; report.py prints it."""

    folder: Path
    job: Job
    artifacts: dict[str, Artifact]
    verifications: dict[str, Verification]
    scores: Scores
    verdicts: list[GateResult]
    seconds: float

    @property
    def failed(self) -> bool:
        return any(not v.sound for v in self.verifications.values()) or any(v.failed for v in self.verdicts)


def choose_device(asked: str) -> torch.device:
    """`auto` takes an accelerator where there is one. Raises QtoolError (exit 3) for one that is not there."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise QtoolError("--device cuda: torch sees no accelerator here. Use --device cpu.", exit_code=3)
    return torch.device(asked)


def prepare(path: Path, device: str, only: tuple[str, ...] = ()) -> Job:
    """Everything that can be refused is refused here, before a weight is read."""
    recipe = load_recipe(path)
    names = [output.name for output in recipe.outputs]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise QtoolError(f"--only {unknown[0]}: the recipe's outputs are {', '.join(names)}.")
    return open_job(
        recipe, resolve(recipe.model.id, recipe.model.revision), choose_device(device), _chosen(recipe, only)
    )


def run(path: Path, runs: Path, device: str = "auto", only: tuple[str, ...] = ()) -> Run:
    """Run a recipe. Raises QtoolError; gate results are returned, not raised."""
    started = time.monotonic()
    job = prepare(path, device, only)
    recipe = job.recipe
    folder = runs / recipe.digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / "recipe.yaml")
    evaluation = _evaluation(job, runs, folder)
    calibration = _calibrate(job)
    methods = _chosen(recipe, only)
    artifacts = make_artifacts(job, methods, calibration)
    verifications = {name: verify(artifact.path) for name, artifact in artifacts.items()}
    _write_lock(folder, job, calibration, artifacts)
    with progress_bar() as bar:
        scores = evaluation.score(_subjects(job, artifacts), bar)
    verdicts = judge(recipe.gates, artifacts, scores)
    result = Run(folder, job, artifacts, verifications, scores, verdicts, time.monotonic() - started)
    _log(result, runs)
    return result


def _chosen(recipe: Recipe, only: tuple[str, ...]) -> list[Method]:
    return [output for output in recipe.outputs if not only or output.name in only]


def _calibrate(job: Job) -> CalibrationSet:
    source = job.recipe.calibration
    tokenizer = load_tokenizer(job.source.path, job.recipe.model.trust_remote_code)
    return CalibrationSet(token_windows(source, tokenizer), source.text)


def _evaluation(job: Job, runs: Path, folder: Path) -> Evaluation:
    trusted = job.recipe.model.trust_remote_code
    return Evaluation(job.recipe.evaluate, job.source.path, job.config, job.device, runs, folder, trusted)


def _subjects(job: Job, artifacts: dict[str, Artifact]) -> list[Subject]:
    return [source_subject(job.checkpoint, job.source.commit), *(artifact_subject(n, a) for n, a in artifacts.items())]


def _write_lock(folder: Path, job: Job, calibration: CalibrationSet, artifacts: dict[str, Artifact]) -> None:
    """What the recipe's names resolved to."""
    lock = {
        "recipe": job.recipe.digest,
        "source": {"model": job.recipe.model.id, "commit": job.source.commit},
        "calibration": calibration.digest,
        "device": device_kind(job.device),
        "versions": versions(),
        "artifacts": {
            name: {"path": str(a.path), "key": a.manifest.key if a.manifest else None} for name, a in artifacts.items()
        },
    }
    write_json(folder / "lock.json", lock)


def _log(result: Run, runs: Path) -> None:
    verdicts = [{"output": v.output, "gate": v.gate, "verdict": v.verdict, "reason": v.reason} for v in result.verdicts]
    write_json(result.folder / "verdicts.json", verdicts)
    scores = {
        name: {task: sum(score.passed) / len(score.passed) for task, score in tasks.items()}
        for name, tasks in result.scores.tasks.items()
    }
    kl = {name: sum(f.kl) / len(f.kl) for name, f in result.scores.fidelity.items()}
    entry = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "run": result.folder.name,
        "model": result.job.recipe.model.id,
        "commit": result.job.source.commit,
        "device": device_kind(result.job.device),
        "seconds": round(result.seconds, 1),
        "artifacts": {
            n: {"bytes": a.manifest.file_bytes, "bpw": a.manifest.bits_per_weight}
            for n, a in result.artifacts.items()
            if a.manifest
        },
        "scores": scores,
        "kl": kl,
        "verdicts": verdicts,
        "failed": result.failed,
    }
    ledger.append(runs, entry)


def evaluate_folders(
    model: Path, source: Path | None, section: EvaluateSection, runs: Path, device: str, trust_remote_code: bool
) -> Scores:
    """Score any model folder, and its source beside it where given. Raises QtoolError."""
    artifact = Artifact.open(model)
    config = load_config(model, trust_remote_code)
    subjects = [artifact_subject(model.resolve().name, artifact)]
    if source is not None and any(source.glob("*.gguf")):  # llama.cpp compares two of its own files
        subjects.insert(0, artifact_subject("source", Artifact.open(source)))
    elif source is not None:
        resolved = resolve(str(source))
        subjects.insert(0, source_subject(Checkpoint.open(resolved.path), resolved.commit))
    elif section.text is not None:
        subjects[0] = Subject("source", subjects[0].key, subjects[0].stream)
    run_folder = runs / digest_of([subject.key for subject in subjects])[:16]
    evaluation = Evaluation(section, model, config, choose_device(device), runs, run_folder, trust_remote_code)
    with progress_bar() as bar:
        return evaluation.score(subjects, bar)
