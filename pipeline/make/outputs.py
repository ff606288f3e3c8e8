"""From a source checkpoint to sealed artifacts: plan, walk once, write every output, re-read what was written, seal."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from qtool import Interrupted, QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.durable import is_still, naming
from qtool.convert.files.folder import drop_journals
from qtool.convert.files.journal import journal_key
from qtool.convert.files.manifest import MANIFEST, read_manifest
from qtool.convert.skeleton import build_skeleton
from qtool.convert.verify.files import check_files
from qtool.make.job import Job, artifact_key, keys_by_threads, threads_matter
from qtool.make.needs import refuse_what_cannot_finish
from qtool.make.output import Output, owners_of
from qtool.make.progress import progress_bar
from qtool.make.writer import OutputWriter
from qtool.make.writing import writing
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.position import Position
from qtool.quantize.ranks import ALONE, Ranks
from qtool.quantize.walk import Column, LayerResult, Walk
from qtool.runs import log
from qtool.runs.stages import stage

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
            f"{folder}: holds an artifact of another recipe, source or version of qtool. --force replaces it; or move "
            "it away, rename this output (`name:`), or change `output_dir:`."
        )
    _, reasons, _ = check_files(folder, manifest)
    if reasons:
        raise QtoolError(f"{folder}: was finished, but {reasons[0]}. Delete the folder and run again.")
    return True


def make_artifacts(
    job: Job, calibration: CalibrationSet, threads: int | None = None, ranks: Ranks = ALONE,
    begins: Callable[[], None] = lambda: None,
) -> dict[str, Artifact]:  # fmt: skip
    """Every output as a sealed artifact; those finished before are reused, those begun are continued.

    ``threads``: of the processor, as the key has them. None: what unfinished work was begun with, else as many as torch
    uses; a finished artifact is then reused whatever number it was made with. ``ranks``: who makes them together; an
    output's owner alone holds its folder. ``begins``: called where something is to be made, once nothing refuses it.
    """
    assert all(output.method.undecided is None for output in job.outputs)  # `budgets.decided` comes first
    with ExitStack() as held:
        unmade = _unmade(job, calibration, threads, ranks, held)
        number = ranks.tell(threads or _begun_with(job, unmade, calibration) or torch.get_num_threads())[0]
        pending = [replace(output, key=artifact_key(job, output, calibration, number)) for output in unmade]
        names = [output.name for output in unmade]
        if made := [output.name for output in job.outputs if output.name not in names]:
            log.say(f"finished before and unchanged, used again: {', '.join(made)}", event="reused", outputs=made)
        owners = owners_of(pending, ranks.number)
        for output in (one for one, owner in zip(pending, owners, strict=True) if owner == ranks.rank):
            _discard_other_work(output)
        ranks.own(
            [(rank, partial(refuse_what_cannot_finish, job, pending, ranks.number)) for rank in range(ranks.number)]
        )
        writers: dict[str, OutputWriter] = {}

        def look(output: Output) -> None:
            _ = output.importance  # read now: a matrix made for another model is named before any work

        def begin(output: Output) -> None:
            writers[output.name] = OutputWriter(job, output)
            held.callback(writers[output.name].release)

        pairs = list(zip(pending, owners, strict=True))
        ranks.own([(owner, partial(look, output)) for output, owner in pairs])
        if pending:
            begins()
        ranks.own([(owner, partial(begin, output)) for output, owner in pairs])
        columns = [Column(output.method, output.plan, owner=owner) for output, owner in pairs]
        reached = Reached(job.decoder.shape.layers)
        with _threads(number), _saying_where(reached):
            if pending:
                _walk(job, writers, columns, calibration, ranks, reached)
            _seal(writers, names, calibration, ranks)
    return {output.name: Artifact.open(output.folder) for output in job.outputs}


def _unmade(job: Job, calibration: CalibrationSet, threads: int | None, ranks: Ranks, held: ExitStack) -> list[Output]:
    """The outputs that are not finished; their unfinished folders are ``held`` by their owners from here on."""
    numbers = [threads] if threads else [torch.get_num_threads(), *range(1, MOST_THREADS + 1)]
    made: list[str] = []

    def look(output: Output) -> None:
        if output.folder.exists() and _reusable(output, keys_by_threads(job, output, calibration, numbers)):
            made.append(output.name)

    def hold(output: Output) -> None:
        with naming(output.partial):
            held.enter_context(_alone(output.partial))
        look(output)  # again: whoever held it may have finished it in the meantime

    ranks.own([(0, partial(look, output)) for output in job.outputs])
    found = ranks.tell(made)[0]
    left = [output for output in job.outputs if output.name not in found]
    made.clear()
    ranks.own([(owner, partial(hold, one)) for one, owner in zip(left, owners_of(left, ranks.number), strict=True)])
    since = {name for names in ranks.tell(made) for name in names}
    return [output for output in left if output.name not in since]


def _reusable(output: Output, keys: Sequence[str]) -> bool:
    """As `finished`; what a kill left after the folder got its name is tidied away."""
    final, partial = output.folder, output.partial
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


def _begun_with(job: Job, outputs: Sequence[Output], calibration: CalibrationSet) -> int | None:
    """The number of threads that unfinished work was begun with: going on with another would end in other bytes."""
    for output in outputs:
        begun = {journal_key(path) for path in output.partial.rglob("*journal.jsonl")}
        if begun and threads_matter(job.device, output.method):
            keys = keys_by_threads(job, output, calibration, range(1, MOST_THREADS + 1))
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


@dataclass
class Reached:
    """How far the walk is: layers that are noted as done, of all."""

    layers: int
    done: int = 0


@contextmanager
def _saying_where(reached: Reached) -> Iterator[None]:
    """Ctrl-C says where the next run goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        done, layers = reached.done, reached.layers
        where = f"at layer {done + 1} of {layers}" if done < layers else f"after the last of {layers} layers"
        raise Interrupted(f"Run the same command again: it continues {where}.") from error


def _seal(writers: Mapping[str, OutputWriter], names: Sequence[str], calibration: CalibrationSet, ranks: Ranks) -> None:
    """Every output that can be; then raises QtoolError for those that cannot. ``names``: of all ranks' outputs."""
    mine: dict[str, tuple[str, int]] = {}
    for writer in writers.values():
        writer.close()  # all files are hashed side by side
    for name, writer in writers.items():
        try:
            with stage("sealing", name):
                writer.seal(calibration)
        except QtoolError as error:
            mine[name] = error.message, error.exit_code
    told = {name: fault for said in ranks.tell(mine) for name, fault in said.items()}
    faults = {name: told[name] for name in names if name in told}
    if faults:
        said = "\n".join(f"{name}: {message}" for name, (message, _) in faults.items())
        done = [name for name in names if name not in faults]
        rest = f"\nFinished all the same: {', '.join(done)} (`--only {done[0]}` goes on with one)." if done else ""
        raise ranks.fault(said + rest, next(iter(faults.values()))[1])


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


def _discard_other_work(output: Output) -> None:
    """What another recipe, source or version began under this name: files that this one does not write would be sealed
    with its own."""
    if all(journal_key(path) != output.key for path in output.partial.rglob("*journal.jsonl")):
        for path in output.partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _walk(
    job: Job,
    writers: Mapping[str, OutputWriter],
    columns: Sequence[Column],
    calibration: CalibrationSet,
    ranks: Ranks,
    reached: Reached,
) -> None:
    """``writers``: of this rank's outputs; ``columns``: all."""
    model = build_skeleton(job.config, job.recipe.model.trust_remote_code)
    start = min(ranks.tell(min((writer.layers_done for writer in writers.values()), default=reached.layers)))
    reached.done = start
    mine = {name: writer.column for name, writer in writers.items()}
    columns = [replace(mine.get(column.method.name, column), owner=column.owner) for column in columns]

    def done() -> None:
        reached.done += 1
        bar.advance(task)

    def tell(layer: int, share: float, what: str) -> None:
        bar.update(task, at=layer + share, doing=f"layer {layer + 1}, {what}")

    walk = Walk(
        model, job.decoder, job.checkpoint, calibration, columns, job.device, job.recipe.experts, ranks, Position(tell)
    )
    with progress_bar() as bar, writing(writers, job.device, job.require_unchanged, done) as written:
        for result in _timed(walk.outside()):
            written.give(result)
        task = bar.add_task("quantizing layers", total=len(walk.layers), completed=start)
        for result in _timed(walk.run(start) if start < len(walk.layers) else iter(())):
            written.give(result)


def _timed(results: Iterator[LayerResult]) -> Iterator[LayerResult]:
    while True:
        with stage("rounding"):
            result = next(results, None)
        if result is None:
            return
        yield result
