"""The straight line: recipe -> source -> plan -> artifacts -> scores -> verdicts -> log."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.durable import require_writable
from qtool.convert.files.reading import read_text
from qtool.convert.files.source import ModelSource
from qtool.convert.formats.table import in_safetensors
from qtool.convert.verify.checks import verify
from qtool.convert.verify.verification import Verification
from qtool.evaluate.scorecard import Scores
from qtool.make.budgets import decided
from qtool.make.job import Job, device_kind, versions
from qtool.make.needs import like
from qtool.make.outputs import make_artifacts
from qtool.make.progress import progress_bar
from qtool.make.rehearsing import rehearsing
from qtool.make.replacing import replacing
from qtool.make.seat import ONE, Seat
from qtool.measure.run import measure_subjects
from qtool.measure.scores import Evaluation
from qtool.measure.subjects import Subject, artifact_subject, source_subject
from qtool.measure.together import divisible, score_together, share_of
from qtool.preparing import calibrate, prepare
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.ranks import ALONE, Home, Ranks
from qtool.recipe.checking import read
from qtool.recipe.overrides import NONE, Overrides, text_of
from qtool.runs import ledger, log, record
from qtool.runs.coverage import coverage
from qtool.runs.evidence import size_text
from qtool.runs.gates import GateResult, judge
from qtool.runs.record import RunRecord
from qtool.runs.sessions import Session, Working, heard, working
from qtool.runs.shelf import give_name
from qtool.runs.stages import stage, write_trace
from qtool.runs.summary import save_summary
from qtool.serve.outputs import prove_artifacts, require_servers


def run(
    path: Path, runs: Path, device: str = "auto", only: tuple[str, ...] = (), profile: Path | None = None,
    overrides: Overrides = NONE, name: str = "", force: bool = False, seat: Seat = ONE,
) -> RunRecord | None:  # fmt: skip
    """Run a recipe, with ``overrides`` in it. Raises QtoolError; gate results are returned, not raised. ``profile``: a
    file for the trace of the stages, written however the run ends. ``name``: what the run is called. ``force``:
    artifacts of other recipes give way where they lie in the way. ``seat``: this process's among several that make the
    artifacts together; all but the first leave then, without a record."""
    if seat.rank:
        with seat.taken(device) as (ranks, own_device):
            _assist(path, runs, own_device, only, overrides, ranks)
        return None
    if profile is not None:
        require_writable(profile.parent, "--profile")
    with working() as session, ExitStack() as held:
        try:
            return _run(path, runs, device, only, overrides, session, held, name, force, seat)
        finally:
            if profile is not None:
                write_trace(profile, session.spans)


def _run(
    path: Path, runs: Path, device: str, only: tuple[str, ...], overrides: Overrides, session: Working,
    held: ExitStack, name: str, force: bool, seat: Seat,
) -> RunRecord:  # fmt: skip
    text = read_text(path) if path.is_file() else ""
    with seat.taken(device) as (ranks, own_device):
        with stage("opening"):
            job = prepare(path, own_device, only, runs, overrides)
        recipe = job.recipe
        for note in job.notes:
            log.say(note)
        rehearsals = held.enter_context(rehearsing(job))
        folder = session.folder = runs / recipe.digest[:16]
        _announce(job, folder)
        with stage("opening"):
            evaluation = _evaluation(job, runs, folder, ranks)
        if recipe.serve is not None:
            kinds = [not in_safetensors(str(output.container.section["quant_method"])) for output in job.outputs]
            require_servers(recipe.serve, kinds)
        with stage("tokenizing"):
            log.say("drawing calibration text", event="stage")
            calibration = calibrate(job)
        if read_text(path) != text:
            raise QtoolError(f"{path}: changed while it was read. Run again.")
        with record.alone(folder):
            record.begin(folder, text_of(text, overrides, read(path, overrides) if overrides else None))
        for other in give_name(folder, name) if name else ():
            log.say(f"{other} was called {name} before")
        with stage("reading the source"):  # what is left of it
            _ = job.source.commit
        if ranks.number > 1:
            ranks.tell([recipe.digest, *job.source.told()])
            Home(ranks).share({"tokens": calibration.tokens})
        job = decided(job, calibration, ranks, rehearsals.ready)
        with replacing(job, calibration, force):
            artifacts = make_artifacts(job, calibration, ranks=ranks, begins=partial(record.withdraw, folder))
        held.close()
        together = ranks if divisible(recipe.evaluate) else ALONE
        if together is ALONE:  # the others leave
            session.beside = heard(ranks.tell(None))
        checks = _verified(artifacts, job.device)
        if recipe.serve is not None:
            artifacts = prove_artifacts(recipe.serve, artifacts, recipe.model.trust_remote_code)
        with record.alone(folder):
            record.write_questions(folder, evaluation.questions())
            lock = _lock(folder, job, calibration, artifacts, overrides)
            record.write_lock(folder, lock)
            if together is not ALONE:
                together.tell(None)  # the artifacts are as they stay
            scores = _scored(job, evaluation, _subjects(job, artifacts), together)
        if together is not ALONE:
            session.beside = heard(ranks.tell(None))
    finished = _kept(job, runs, folder, lock, checks, artifacts, scores, session)
    if not session.so_far().worked:
        log.say("nothing was left to do: artifacts and scores are those of earlier runs", event="reused")
    return finished


def _kept(
    job: Job, runs: Path, folder: Path, lock: record.Lock, checks: Mapping[str, Verification],
    artifacts: dict[str, Artifact], scores: Scores, session: Working,
) -> RunRecord:  # fmt: skip
    """The run as it is kept: measured, summed up, judged, noted in the ledger."""
    with record.alone(folder):
        _measured(job, _subjects(job, artifacts), runs)
        manifests = {name: artifact.manifest for name, artifact in artifacts.items() if artifact.manifest}
        summary = record.summary_of(folder, lock, manifests, scores)
        save_summary(folder, summary)
        whole = session.whole()
        record.write_result(folder, _result(whole, checks, judge(summary, job.recipe.gates)))
        finished = record.load_run(folder)
    ledger.append(runs, _entry(finished) | {"made": whole.made, "like": like(job.recipe)})
    return finished


def _result(whole: Session, checks: Mapping[str, Verification], verdicts: list[GateResult]) -> record.Result:
    return record.Result(
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=whole.seconds,
        stages=whole.stages,
        peaks=whole.peaks,
        checks={name: found.checks for name, found in checks.items()},
        verdicts=verdicts,
    )


def _announce(job: Job, folder: Path) -> None:
    """The head of a run's log: model, device, outputs, the run's id."""
    nbytes = sum(info.nbytes for info in job.checkpoint.tensors.values())
    names = [output.name for output in job.outputs]
    size, device = size_text(nbytes), device_kind(job.device)
    log.say(
        f"{job.source.name} ({size}) on {device}: {', '.join(names)}; run {folder.name} in {folder}",
        event="begin", run=folder.name, folder=str(folder), model=job.recipe.model.id, bytes=nbytes, device=device,
        outputs=names,
    )  # fmt: skip


def _assist(path: Path, runs: Path, device: str, only: tuple[str, ...], overrides: Overrides, ranks: Ranks) -> None:
    """Make and score the artifacts with rank 0, which opens the source and tokenizes first: what it refuses, it says
    alone."""
    with working() as session:
        digest, *told = ranks.tell(None)[0]
        tokens = Home(ranks).share({})["tokens"]
        job = prepare(path, device, only, overrides=overrides, source=ModelSource.heard(told))
        if job.recipe.digest != digest:
            raise QtoolError(f"{path}: changed while it was read. Run again.")
        calibration = CalibrationSet(tokens, job.recipe.calibration.text)
        artifacts = make_artifacts(decided(job, calibration, ranks), calibration, ranks=ranks)
        if divisible(job.recipe.evaluate):
            ranks.tell(None)  # rank 0 has verified the artifacts and proved them, which writes into their manifests
            _scored(job, _evaluation(job, runs, runs / digest[:16], ranks), _subjects(job, artifacts), ranks)
        ranks.tell(session.so_far().model_dump())


def make(job: Job) -> dict[str, Artifact]:
    """Every output of the job's recipe as a finished artifact, by name. Raises QtoolError."""
    for note in job.remarks:
        log.say(note)
    with rehearsing(job) as rehearsals:
        calibration = calibrate(job)
        return make_artifacts(decided(job, calibration, ready=rehearsals.ready), calibration)


def _scored(job: Job, evaluation: Evaluation, subjects: list[Subject], ranks: Ranks) -> Scores:
    """Scores of all subjects, as rank 0 knows them, for whom the others work."""
    with progress_bar() as bar:
        scores = score_together(evaluation, subjects, bar, ranks)
    if not ranks.rank:
        record.write_scores(evaluation.run, {subject.name: subject.key for subject in subjects}, scores)
    return scores


def _measured(job: Job, subjects: list[Subject], runs: Path) -> None:
    """Where the recipe asks for it memory and speed, by processes of their own."""
    if (asked := job.recipe.measure) is None:
        return
    with progress_bar() as bar:
        measure_subjects(asked, subjects, job.device, job.recipe.model.trust_remote_code, runs, bar)


def _verified(artifacts: dict[str, Artifact], device: torch.device) -> dict[str, Verification]:
    with progress_bar() as bar:
        task = bar.add_task("verifying artifacts", total=len(artifacts))
        checks = {}
        for name, artifact in artifacts.items():
            with stage("verifying", name):
                checks[name] = verify(artifact.path, device=device)
            bar.advance(task)
    return checks


def _evaluation(job: Job, runs: Path, folder: Path, ranks: Ranks) -> Evaluation:
    asked, trusted = job.recipe.evaluate, job.recipe.model.trust_remote_code
    return Evaluation(asked, job.source.path, job.config, job.device, runs, folder, trusted, share_of(ranks))


def _subjects(job: Job, artifacts: dict[str, Artifact]) -> list[Subject]:
    return [source_subject(job.checkpoint, job.source.commit), *(artifact_subject(n, a) for n, a in artifacts.items())]


def _lock(
    folder: Path, job: Job, calibration: CalibrationSet, artifacts: dict[str, Artifact], overrides: Overrides
) -> record.Lock:
    """What the recipe's names resolved to."""
    nbytes = sum(info.nbytes for info in job.checkpoint.tensors.values())
    parameters = job.outputs[0].plan.parameters
    return record.Lock(
        recipe=job.recipe.digest,
        overrides=dict(overrides),
        source=record.LockedSource(
            model=job.recipe.model.id, name=job.source.name, commit=job.source.commit,
            bytes=nbytes, bits_per_weight=8 * nbytes / parameters,
        ),
        calibration=calibration.digest,
        device=device_kind(job.device),
        versions=versions(),
        artifacts={name: record.locked(artifact.path, folder) for name, artifact in artifacts.items()},
    )  # fmt: skip


def _entry(run: RunRecord) -> dict[str, Any]:
    """A run's line in the ledger."""
    models = run.summary.models
    return {
        "time": run.finished,
        "run": run.folder.name,
        "model": run.lock.source.model,
        "commit": run.lock.source.commit,
        "device": run.lock.device,
        "seconds": run.seconds,
        "stages": run.stages,
        "peaks": run.peaks,
        "artifacts": {n: {"bytes": m.file_bytes, "bpw": m.bits_per_weight} for n, m in run.manifests.items()},
        "experts": {n: found.as_json() for n, m in run.manifests.items() if (found := coverage(m.ledger))},
        "scores": {
            name: {task: found.rate.estimate for task, found in model.tasks.items()}
            for name, model in models.items()
            if model.tasks
        },
        "kl": {name: model.text.kl.estimate for name, model in models.items() if model.text},
        "verdicts": [
            {"output": v.output, "gate": v.gate, "verdict": v.verdict, "reason": v.reason} for v in run.verdicts
        ],
        "failed": run.failed,
    }
