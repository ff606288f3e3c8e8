"""Rehearsals beside a run: a process for each output that has Triton compile the kernels which the walk will launch;
where a budget is still to be spent, one for each type that a survey will round to, so that they compile side by side.

They begin before the source is read and the text tokenized, and end with the walk at the latest. What they do not get
done the walk compiles itself; whatever goes wrong in them is nobody's business. A survey waits for a type's rehearsal
before it rounds to it: compiling the same beside it would take longer.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from qtool.convert.files.config_file import read_config
from qtool.convert.formats.plan import ModelShape
from qtool.make.job import Job, device_kind, versions
from qtool.make.needs import needs_of
from qtool.make.output import Output
from qtool.quantize.rehearsal import Wanted, reduced_width

LONGEST = 300.0  # seconds that a survey waits for one type
CONTEXT = 2**30  # bytes of an accelerator that a process takes: CUDA's own half a GiB, and the tiny model
WEIGHED = {"imatrix": True, "rounding": "ggml"}  # as by a file of other widths than the tiny model's
KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "TRITON_CACHE_DIR", "TMPDIR", "CC")


class Rehearsals:
    """Those that run."""

    def __init__(self) -> None:
        self._running: list[tuple[Wanted, subprocess.Popen[str]]] = []

    def begin(self, job: Job) -> None:
        """Start what is worth it."""
        for wanted in _worth(job):
            self._running.append((wanted, _start(wanted, _mark(job, wanted))))

    def ready(self, kind: str) -> None:
        """Returns as soon as no process rehearses that type any more."""
        for wanted, process in self._running:
            if kind in wanted.widths:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LONGEST)

    def end(self) -> None:
        """Whatever still runs."""
        for _, process in self._running:
            process.kill()
            process.wait()


@contextmanager
def rehearsing(job: Job) -> Iterator[Rehearsals]:
    """Rehearse in the block what is worth it."""
    rehearsals = Rehearsals()
    try:
        with suppress(Exception):  # a rehearsal never fails a run
            rehearsals.begin(job)
        yield rehearsals
    finally:
        rehearsals.end()


def _worth(job: Job) -> list[Wanted]:
    """Of dense models whose outputs are still to be made on an accelerator with room to spare: the types of budgets,
    which are needed first, and the outputs, where Triton has not compiled for such before."""
    unmade = [output for output in job.outputs if not output.folder.exists()]
    if job.device.type != "cuda" or job.decoder.shape.experts or job.recipe.model.trust_remote_code or not unmade:
        return []
    needs = needs_of(job, pending=unmade)
    room = (needs.device_free or 0) - needs.device_bytes
    wanted = [one for output in unmade for one in (_types if output.method.undecided else _walk)(job, output)]
    marks = {_mark(job, one): one for one in wanted}  # budgets that round alike are rehearsed once
    found = sorted((one for mark, one in marks.items() if not mark.exists()), key=lambda one: not one.widths)
    return found[: max(0, room // CONTEXT)]


def _walk(job: Job, output: Output) -> list[Wanted]:
    section = output.method.model_dump(mode="json") | (WEIGHED if output.imatrix else {})
    return [_wanted(job, section, {})]


def _types(job: Job, output: Output) -> list[Wanted]:
    """The types that lose something, one a process where there are as many cores."""
    section = output.method.model_dump(mode="json", exclude={"budget"}) | {"name": "types"}
    raw, decoder = read_config(job.source.path), job.decoder
    shapes = {name: info.shape for name, info in job.checkpoint.tensors.items()}
    columns = {name.removesuffix(".weight"): shape[-1] for name, shape in shapes.items()} | {
        decoder.at(layer) + matrix.module: matrix.shape(shapes[decoder.at(layer) + matrix.tensor])[1]
        for layer in range(decoder.shape.layers)
        for matrix in decoder.matrices(layer)
    }
    widths: dict[str, set[int]] = {}
    for module, own in output.method.offers(ModelShape(job.checkpoint.tensors, decoder, raw)).items():
        for kind in own.keys() - {max(own, key=lambda kind: own[kind])}:
            widths.setdefault(kind, set()).add(reduced_width(columns[module]))
    kinds, processes = sorted(widths), min(len(widths), os.cpu_count() or 1)
    return [_wanted(job, section, {kind: sorted(widths[kind]) for kind in kinds[n::processes]})
            for n in range(processes)]  # fmt: skip


def _wanted(job: Job, section: dict[str, Any], widths: dict[str, list[int]]) -> Wanted:
    dtype = str(next(iter(job.checkpoint.tensors.values())).dtype).removeprefix("torch.")
    config = {} if widths else read_config(job.source.path)
    return Wanted(config=config, dtype=dtype, outputs=[section], device=str(job.device), widths=widths)


def _mark(job: Job, wanted: Wanted) -> Path:
    """Beside Triton's kernels: a file that says that this was rehearsed to its end."""
    cache = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    kernels = torch.version.cuda, device_kind(job.device), versions()
    made = json.dumps([wanted.model_dump(mode="json"), *kernels], sort_keys=True)
    return Path(cache) / f"qtool-rehearsed-{hashlib.sha256(made.encode()).hexdigest()[:16]}"


def _start(wanted: Wanted, mark: Path) -> subprocess.Popen[str]:
    """A rehearsal that is killed leaves no mark."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "qtool.quantize.rehearsal", str(mark)], stdin=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=kept | {"OMP_NUM_THREADS": "1"}, cwd="/",
    )  # fmt: skip
    assert process.stdin is not None
    with process.stdin as given:
        given.write(wanted.model_dump_json())
    return process
