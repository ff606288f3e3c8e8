"""From a source checkpoint to sealed artifacts: plan, walk once, write every output, re-read what was written, seal."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from qtool import QtoolError
from qtool.convert.artifact import MANIFEST, Artifact, read_manifest
from qtool.convert.gguf_plan import GgufPlan
from qtool.convert.imatrix import read_imatrix
from qtool.convert.skeleton import build_skeleton
from qtool.convert.verify_files import check_files
from qtool.convert.writer import resume_journal
from qtool.gguf_output import GgufOutput
from qtool.job import Job, artifact_key
from qtool.job_needs import refuse_what_cannot_finish
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.layers import Walk
from qtool.quantize.methods import GgufMethod, Method
from qtool.writers import SafetensorsOutput

Writer = SafetensorsOutput | GgufOutput


def finished(folder: Path, key: str) -> bool:
    """Whether ``folder`` already is this very artifact, unchanged. Raises QtoolError when it is something else."""
    if not folder.exists():
        return False
    if not (folder / MANIFEST).exists():
        raise QtoolError(f"{folder}: exists and was not written by qtool. Move it away, or change `output_dir:`.")
    manifest = read_manifest(folder)
    if manifest.key != key:
        raise QtoolError(
            f"{folder}: holds an artifact of another recipe, source or version of qtool. Move it away, rename this "
            "output (`name:`), or change `output_dir:`."
        )
    _, reasons, _ = check_files(folder, manifest)
    if reasons:
        raise QtoolError(f"{folder}: was finished, but {reasons[0]}. Delete the folder and run again.")
    return True


def make_artifacts(job: Job, methods: Sequence[Method], calibration: CalibrationSet) -> dict[str, Artifact]:
    """Every output as a sealed artifact; those finished before are reused, those begun are continued."""
    keys = {method.name: artifact_key(job, method, calibration) for method in methods}
    pending = [method for method in methods if not finished(job.folder(method), keys[method.name])]
    Path(job.recipe.output_dir).expanduser().mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        for method in pending:
            held.enter_context(_alone(job.partial(method)))
            _discard_other_work(job.partial(method), keys[method.name])
        refuse_what_cannot_finish(job, pending)
        importance = _importance(job, pending)
        writers = {method.name: _writer(job, method, keys[method.name]) for method in pending}
        if writers:
            _walk(job, pending, writers, calibration, importance)
        _seal(writers, calibration)
    return {method.name: Artifact.open(job.folder(method)) for method in methods}


def _seal(writers: Mapping[str, Writer], calibration: CalibrationSet) -> None:
    """Every output that can be; then raises QtoolError for those that cannot."""
    faults: dict[str, QtoolError] = {}
    for name, writer in writers.items():
        try:
            writer.seal(calibration)
        except QtoolError as error:
            faults[name] = error
    if faults:
        said = "\n".join(f"{name}: {error.message}" for name, error in faults.items())
        done = [name for name in writers if name not in faults]
        rest = f"\nFinished all the same: {', '.join(done)} (`--only {done[0]}` goes on with one)." if done else ""
        raise QtoolError(said + rest, exit_code=next(iter(faults.values())).exit_code)


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Hold the unfinished folder: two writers would note every layer twice, and a third would take more layers for
    finished than are. Raises QtoolError (exit 3) where another process holds it."""
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise QtoolError(f"{partial}: another qtool is writing there. Wait until it ends.", exit_code=3) from error
        yield
    finally:
        os.close(descriptor)
        with suppress(OSError):  # renamed, or begun
            partial.rmdir()


def _discard_other_work(partial: Path, key: str) -> None:
    """What another recipe, source or version began under this name: files that this one does not write would be sealed
    with its own."""
    if all(resume_journal(path, key) is None for path in partial.rglob("*journal.jsonl")):
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _writer(job: Job, method: Method, key: str) -> Writer:
    if isinstance(method, GgufMethod):
        return GgufOutput(job, method, key)
    return SafetensorsOutput(job, method, key)


def _importance(job: Job, methods: Sequence[Method]) -> dict[str, dict[str, Tensor]]:
    """Output -> linear -> mean squares, for outputs whose recipe names an importance matrix's file."""
    found = {}
    for method in methods:
        plan = job.plans[method.name]
        if isinstance(method, GgufMethod) and isinstance(method.imatrix, str) and isinstance(plan, GgufPlan):
            found[method.name] = _rows(plan, Path(method.imatrix).expanduser())
    return found


def _rows(plan: GgufPlan, path: Path) -> dict[str, Tensor]:
    rows = read_imatrix(path)
    named = {linear: plan.names[f"{linear.name}.weight"] for linear in plan.linears}
    wrong = [name for linear, name in named.items() if name in rows and rows[name].numel() != linear.columns]
    if wrong or not any(name in rows for name in named.values()):
        why = f"{wrong[0]} has {rows[wrong[0]].numel()} values" if wrong else "it has none of this model's names"
        raise QtoolError(f"{path}: made for another model: {why}.")
    return {linear.name: rows[name] for linear, name in named.items() if name in rows}


def _walk(
    job: Job,
    methods: Sequence[Method],
    writers: Mapping[str, Writer],
    calibration: CalibrationSet,
    importance: Mapping[str, Mapping[str, Tensor]],
) -> None:
    model = build_skeleton(job.config, job.recipe.model.trust_remote_code)
    start = min(writer.layers_done for writer in writers.values())
    types = {name: {linear.name: linear.type for linear in plan.linears} for name, plan in job.plans.items()}
    walk = Walk(
        model, job.checkpoint, calibration, methods, job.device, lambda name, index: writers[name].restore(index),
        types, importance,
    )  # fmt: skip
    for writer in writers.values():
        writer.write_outside_layers()
    with progress_bar() as bar:
        task = bar.add_task("quantizing layers", total=len(walk.layers), completed=start)
        for result in walk.run(start):
            for name, output in result.outputs.items():
                writers[name].write_layer(result.index, output)
            bar.advance(task)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """The one progress bar: written to stderr, quiet where nobody watches."""
    from rich.console import Console

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield bar
