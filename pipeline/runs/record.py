"""A finished run as its folder under `runs/` tells it: written once by `qtool run`, read by every later command."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from qtool import QtoolError
from qtool.convert.files.durable import held, naming, sweep, write_whole
from qtool.convert.files.manifest import MANIFEST, Manifest, read_manifest
from qtool.convert.files.reading import read_bytes, read_text
from qtool.convert.verify.verification import Check, Verification
from qtool.evaluate.scorecard import FidelityScore, PositionScore, Scores, TaskScore
from qtool.recipe.judging import Judging, load_judging
from qtool.runs.gates import GateResult
from qtool.runs.measurements import measured_models
from qtool.runs.places import as_typed, path_from
from qtool.runs.summary import SUMMARY, Size, Summary, evidence_of, stored_summary, summarise

RECIPE, LOCK, INDEX, QUESTIONS, RESULT = "recipe.yaml", "lock.json", "scores.json", "questions.json", "result.json"
MANIFESTS, SCORES, LOCKED = "manifests", "scores", "qtool.lock"
File = TypeVar("File", bound=BaseModel)
Read = TypeVar("Read")
_QUESTIONS: TypeAdapter[dict[str, dict[str, str]]] = TypeAdapter(dict[str, dict[str, str]])


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LockedSource(_File):
    """The source model as it was found: Hub id or folder, its short name, its commit, its size."""

    model: str
    name: str
    commit: str
    bytes: PositiveInt
    bits_per_weight: PositiveFloat


class LockedArtifact(_File):
    """Where an artifact lay, relative to the run's folder, and the key that says which it is."""

    path: str
    key: str


class Lock(_File):
    """`lock.json`: what the recipe's names resolved to. ``overrides``: what `--set` put into it, by path."""

    recipe: str
    overrides: dict[str, Any] = {}
    source: LockedSource
    calibration: str
    device: str
    versions: dict[str, str]
    artifacts: dict[str, LockedArtifact]


class ScoreIndex(_File):
    """`scores.json`: which models were judged (name -> key) and which score files are theirs (name -> score key)."""

    subjects: dict[str, str]
    tasks: dict[str, dict[str, str]]
    fidelity: dict[str, str]
    contexts: dict[str, list[str]] = {}  # fidelity at every window length, the one above included
    positions: dict[str, list[str]] = {}  # along a long text, under every condition


class Result(_File):
    """`result.json`, written last: its presence says that the run finished."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    finished: str
    seconds: float
    stages: dict[str, float] = {}  # seconds of each; what runs side by side adds up to more
    peaks: dict[str, int] = {}  # bytes
    checks: dict[str, list[Check]]
    verdicts: list[GateResult]


@dataclass(frozen=True)
class RunRecord:
    """What a finished run knows. ``folders``: of those artifacts that are still where it left them; ``manifests`` are
    kept in the run's own folder, so that sizes and error ledgers outlive the artifacts. ``summary``: every number that
    the run comes to, with what the ledger beside that folder has of these very models, whoever measured it; ``scores``:
    the answers behind it."""

    folder: Path
    recipe: Judging
    recipe_text: str
    lock: Lock
    folders: dict[str, Path]
    manifests: dict[str, Manifest]
    checks: dict[str, Verification]
    scores: Scores
    summary: Summary
    verdicts: list[GateResult]
    finished: str
    seconds: float
    stages: dict[str, float]
    peaks: dict[str, int]

    @property
    def failed(self) -> bool:
        engines = self.recipe.serve.prove if self.recipe.serve else ()
        proofs = [proof for found in self.summary.proofs.values() for proof in found if proof.engine in engines]
        unsound = any(not found.sound for found in self.checks.values())
        return unsound or any(v.failed for v in self.verdicts) or not all(proof.passed for proof in proofs)

    def questions(self) -> dict[str, dict[str, str]]:
        """Task -> problem -> its prompt; empty where the run asked none."""
        path = self.folder / QUESTIONS
        return _checked(_QUESTIONS.validate_json, path) if path.exists() else {}


def begin(folder: Path, recipe_text: str) -> None:
    """Start (again): what an earlier run of the same recipe concluded and scored stays."""
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, folder / MANIFESTS):
        sweep(place)
    write_whole(folder / RECIPE, recipe_text)


def withdraw(folder: Path) -> None:
    """Before an artifact is made anew: what an earlier run of the same recipe concluded no longer holds."""
    with naming(folder):
        for name in (RESULT, SUMMARY):
            (folder / name).unlink(missing_ok=True)


def alone(folder: Path) -> AbstractContextManager[None]:
    """Only one process at a time judges the models of a run or evaluation and writes what it found; a second waits,
    and finds the scores."""
    return held(folder / LOCKED, f"{folder}: another qtool is working on this run; waiting until it ends.")


def write_questions(folder: Path, questions: dict[str, dict[str, str]]) -> None:
    """Task -> problem -> its prompt."""
    _write(folder / QUESTIONS, questions)


def write_lock(folder: Path, lock: Lock) -> None:
    """The lock, and a copy of each artifact's manifest."""
    _write(folder / LOCK, lock.model_dump(mode="json"))
    for name, entry in lock.artifacts.items():
        write_whole(folder / MANIFESTS / f"{name}.json", read_bytes(folder / entry.path / MANIFEST))


def locked(artifact: Path, folder: Path) -> LockedArtifact:
    """A finished artifact as the lock of the run in ``folder`` names it."""
    return LockedArtifact(path=path_from(folder, artifact), key=read_manifest(artifact).key)


def write_scores(folder: Path, subjects: dict[str, str], scores: Scores) -> None:
    """Which scores belong together; the scores themselves lie beside, one file each."""
    index = ScoreIndex(
        subjects=subjects,
        tasks={name: {label: score.key for label, score in found.items()} for name, found in scores.tasks.items()},
        fidelity={name: score.key for name, score in scores.fidelity.items()},
        contexts={name: [score.key for score in found.values()] for name, found in scores.contexts.items()},
        positions={name: [score.key for score in found.values()] for name, found in scores.positions.items()},
    )
    _write(folder / INDEX, index.model_dump(mode="json"))


def write_result(folder: Path, result: Result) -> None:
    """The end of a run: whole or absent."""
    _write(folder / RESULT, json.loads(result.model_dump_json()))


def _write(path: Path, data: Any) -> None:
    write_whole(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def load_run(folder: Path) -> RunRecord:
    """Raises QtoolError for a folder that is no run, or one that did not reach its end."""
    if not (folder / RECIPE).exists():
        raise QtoolError(f"{folder}: not a run; `qtool run` makes one, and `qtool runs` lists them.")
    if not (folder / RESULT).exists():
        raise QtoolError(f"{folder}: this run did not reach its end. Run its recipe again; it continues.")
    lock = read_part(Lock, folder / LOCK)
    result = read_part(Result, folder / RESULT)
    there = {name: found for name, entry in lock.artifacts.items() if (found := _there(folder, entry)) is not None}
    paths = {name: as_typed(folder / entry.path) for name, entry in lock.artifacts.items()}
    manifests = {name: _manifest(folder / MANIFESTS / f"{name}.json") for name in lock.artifacts}
    for name, (_, manifest) in there.items():  # with the proofs that it has by now
        manifests[name] = manifests[name].model_copy(update={"proofs": manifest.proofs})
    scores = load_scores(folder)
    return RunRecord(
        folder=folder,
        recipe=load_judging(folder / RECIPE),
        recipe_text=read_text(folder / RECIPE),
        lock=lock,
        folders={name: path for name, (path, _) in there.items()},
        manifests=manifests,
        checks={name: Verification(paths[name], checks) for name, checks in result.checks.items()},
        scores=scores, summary=summary_of(folder, lock, manifests, scores),
        verdicts=result.verdicts, finished=result.finished, seconds=result.seconds, stages=result.stages,
        peaks=result.peaks,
    )  # fmt: skip


def summary_of(folder: Path, lock: Lock, manifests: Mapping[str, Manifest], scores: Scores) -> Summary:
    """The run's Summary: the stored one, or a new one where that is of other scores, or there is none."""
    sizes = {"source": Size(lock.source.bytes, lock.source.bits_per_weight)}
    sizes |= {name: Size(m.tensor_bytes, m.bits_per_weight, m.file_bytes) for name, m in manifests.items()}
    summary = stored_summary(folder, evidence_of(scores, sizes)) or summarise(scores, sizes)
    keys = {"source": lock.source.commit} | {name: entry.key for name, entry in lock.artifacts.items()}
    proofs = {name: manifest.proofs for name, manifest in manifests.items()}
    return summary.with_measured(measured_models(folder.resolve().parent, keys)).with_proofs(proofs)


def load_summary(folder: Path) -> Summary:
    """Of a run, or of an evaluation. Raises QtoolError where the folder holds no scores."""
    if (folder / LOCK).exists():
        return load_run(folder).summary
    scores = load_scores(folder)
    return stored_summary(folder, evidence_of(scores, {})) or summarise(scores)


def load_index(folder: Path) -> ScoreIndex:
    """`scores.json` of a run or of an evaluation. Raises QtoolError where there is none."""
    if not (folder / INDEX).exists():
        raise QtoolError(f"{folder}: holds no scores; `qtool run` and `qtool evaluate` write them.")
    return read_part(ScoreIndex, folder / INDEX)


def load_scores(folder: Path) -> Scores:
    """The scores that `scores.json` names. Raises QtoolError naming one that is missing or broken."""
    index = load_index(folder)
    scores = Scores()
    for name, keys in index.tasks.items():
        for label, key in keys.items():
            path = _score_file(folder, key)
            task = read_part(TaskScore, path)
            if fault := task.fault(list(task.outcomes)):
                raise QtoolError(f"{path}: {fault}. Run the recipe again: it is made anew.")
            scores.tasks.setdefault(name, {})[label] = task.model_copy(update={"subject": name})
    for name, first in index.fidelity.items():
        for key in index.contexts.get(name, [first]):
            fidelity = read_part(FidelityScore, _score_file(folder, key))
            scores.add_fidelity(fidelity.model_copy(update={"subject": name}))
    for name, along in index.positions.items():
        for key in along:
            found = read_part(PositionScore, _score_file(folder, key))
            scores.add_positions(found.model_copy(update={"subject": name}))
    return scores


def _there(folder: Path, entry: LockedArtifact) -> tuple[Path, Manifest] | None:
    """The artifact's folder and manifest, if it is still where it was and still the same."""
    path = folder / entry.path
    manifest = read_manifest(path) if (path / MANIFEST).exists() else None
    return (as_typed(path), manifest) if manifest is not None and manifest.key == entry.key else None


def _manifest(path: Path) -> Manifest:
    found = read_part(Manifest, path)
    if not (found.tensor_bytes > 0 and found.bits_per_weight > 0):
        raise QtoolError(f"{path}: tensor_bytes, bits_per_weight: not those of a model. Run the recipe again.")
    return found


def _score_file(folder: Path, key: str) -> Path:
    scores, end = folder / SCORES, f"{key[:16]}.json"
    names = os.listdir(scores) if scores.is_dir() else []
    return scores / next((name for name in names if name.endswith(f"-{end}")), end)


def read_part(model: type[File], path: Path) -> File:
    """A file of a run. Raises QtoolError naming one that is missing or damaged."""
    return _checked(model.model_validate_json, path)


def _checked(reader: Callable[[bytes], Read], path: Path) -> Read:
    """Raises QtoolError naming a file that is missing or damaged."""
    if not path.exists():
        raise QtoolError(f"{path}: No such file or directory. The run's folder is incomplete; run its recipe again.")
    try:
        return reader(read_bytes(path))
    except ValidationError as error:
        fault = error.errors()[0]
        if fault["type"] == "json_invalid":
            raise QtoolError(f"{path}: damaged ({fault['msg']}). Run its recipe again.") from error
        place = ".".join(map(str, fault["loc"]))
        raise QtoolError(f"{path}: not written by this version of qtool ({place}: {fault['msg']}).") from error
