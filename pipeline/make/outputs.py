"""From a source checkpoint to sealed artifacts: plan, walk once, write every output, re-read what was written, seal."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import click
import torch
from torch import Tensor

from qtool import QtoolError
from qtool.cli.boundary import Interrupted
from qtool.convert.files.artifact import Artifact, drop_journals
from qtool.convert.files.durable import is_still, naming
from qtool.convert.files.manifest import MANIFEST, read_manifest
from qtool.convert.files.reading import named
from qtool.convert.files.writer import journal_key
from qtool.convert.formats.gguf.imatrix import read_imatrix
from qtool.convert.formats.gguf.plan import GgufPlan
from qtool.convert.skeleton import build_skeleton
from qtool.convert.verify.files import check_files
from qtool.make.gguf_output import GgufOutput
from qtool.make.job import Job, artifact_key, keys_by_threads, threads_matter
from qtool.make.needs import refuse_what_cannot_finish
from qtool.make.progress import progress_bar
from qtool.make.writers import SafetensorsOutput
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.sections import GgufMethod, Method
from qtool.quantize.walk import Walk

Writer = SafetensorsOutput | GgufOutput
MOST_THREADS = 512  # that an artifact is looked for with


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


def make_artifacts(
    job: Job, methods: Sequence[Method], calibration: CalibrationSet, threads: int | None = None
) -> dict[str, Artifact]:
    """Every output as a sealed artifact; those finished before are reused, those begun are continued.

    ``threads``: of the processor, as the key has them. None: what unfinished work was begun with, else as many as torch
    uses; a finished artifact is then reused whatever number it was made with.
    """
    with ExitStack() as held:
        pending = [method for method in methods if not _done(job, method, calibration, threads, held)]
        number = threads or _begun_with(job, pending, calibration) or torch.get_num_threads()
        keys = {method.name: artifact_key(job, method, calibration, number) for method in pending}
        if made := [method.name for method in methods if method not in pending]:
            click.echo(f"finished before and unchanged, used again: {', '.join(made)}", err=True)
        for method in pending:
            _discard_other_work(job.partial(method), keys[method.name])
        refuse_what_cannot_finish(job, pending)
        importance = _importance(job, pending)
        writers: dict[str, Writer] = {}
        for method in pending:
            writers[method.name] = _writer(job, method, keys[method.name])
            held.callback(writers[method.name].release)
        with _threads(number), _saying_where(writers, job.config.num_hidden_layers):
            if writers:
                _walk(job, pending, writers, calibration, importance)
            _seal(writers, calibration)
    return {method.name: Artifact.open(job.folder(method)) for method in methods}


def _done(job: Job, method: Method, calibration: CalibrationSet, threads: int | None, held: ExitStack) -> bool:
    """Whether the output is finished; where it is not, its unfinished folder is ``held`` from here on."""
    final, partial = job.folder(method), job.partial(method)
    numbers = [threads] if threads else [torch.get_num_threads(), *range(1, MOST_THREADS + 1)]
    keys = keys_by_threads(job, method, calibration, numbers)
    if final.exists():
        return _reusable(final, partial, keys)
    with naming(partial):
        held.enter_context(_alone(partial))
    # looked at again: whoever held it may have finished it in the meantime
    return final.exists() and _reusable(final, partial, keys)


def _reusable(final: Path, partial: Path, keys: Sequence[str]) -> bool:
    """As `finished`; what a kill left after the folder got its name is tidied away."""
    key = read_manifest(final).key if (final / MANIFEST).exists() else ""
    if not finished(final, key if key in keys else keys[0]):
        return False
    with suppress(OSError, QtoolError):  # on a disk that is read-only nothing is tidied
        drop_journals(final)
        if any(journal_key(path) in keys for path in partial.rglob("*journal.jsonl")):
            with _alone(partial):
                shutil.rmtree(partial)
        elif partial.exists():
            partial.rmdir()
    return True


def _begun_with(job: Job, methods: Sequence[Method], calibration: CalibrationSet) -> int | None:
    """The number of threads that unfinished work was begun with: going on with another would end in other bytes."""
    for method in methods:
        begun = {journal_key(path) for path in job.partial(method).rglob("*journal.jsonl")}
        if begun and threads_matter(job.device, method):
            keys = keys_by_threads(job, method, calibration, range(1, MOST_THREADS + 1))
            if numbers := [number for number, key in enumerate(keys, 1) if key in begun]:
                return numbers[0]
    return None


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _saying_where(writers: Mapping[str, Writer], layers: int) -> Iterator[None]:
    """Ctrl-C says where the next run goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        done = min((writer.layers_done for writer in writers.values()), default=layers)
        where = f"at layer {done + 1} of {layers}" if done < layers else f"after the last of {layers} layers"
        raise Interrupted(f"Run the same command again: it continues {where}.") from error


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
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise QtoolError(f"{partial}: another qtool is writing there. Wait until it ends.", exit_code=3) from error
        if is_still(partial, descriptor):
            break
        os.close(descriptor)  # it was renamed or removed while we opened it
    try:
        yield
    finally:
        os.close(descriptor)
        with suppress(OSError):  # renamed, or begun
            partial.rmdir()


def _discard_other_work(partial: Path, key: str) -> None:
    """What another recipe, source or version began under this name: files that this one does not write would be sealed
    with its own."""
    if all(journal_key(path) != key for path in partial.rglob("*journal.jsonl")):
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
            found[method.name] = _rows(plan, named(method.imatrix))
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
        model, job.decoder, job.checkpoint, calibration, methods, job.device,
        lambda name, index: writers[name].restore(index), types, importance,
    )  # fmt: skip
    for writer in writers.values():
        writer.write_outside_layers()
    with progress_bar() as bar:
        task = bar.add_task("quantizing layers", total=len(walk.layers), completed=start)
        for result in walk.run(start) if start < len(walk.layers) else ():
            job.require_unchanged()  # before any layer is noted as done
            for name, output in result.outputs.items():
                writers[name].write_layer(result.index, output)
            bar.advance(task)
