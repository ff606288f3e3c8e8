"""Rehearsals beside a run: a process for each output that has Triton compile the kernels which the walk will launch.

They begin before the source is read and the text tokenized, and end with the walk at the latest. What they do not get
done the walk compiles itself; whatever goes wrong in them is nobody's business.
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

import torch

from qtool.convert.files.config_file import read_config
from qtool.make.job import Job, device_kind, versions
from qtool.make.needs import needs_of
from qtool.quantize.rehearsal import Wanted

CONTEXT = 2**30  # bytes of an accelerator that a process takes: CUDA's own half a GiB, and the tiny model
WEIGHED = {"imatrix": True, "rounding": "ggml"}  # as by a file of other widths than the tiny model's
KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "TRITON_CACHE_DIR", "TMPDIR", "CC")


@contextmanager
def rehearsing(job: Job) -> Iterator[None]:
    """Rehearse in the block what is worth it."""
    running: list[subprocess.Popen[str]] = []
    try:
        with suppress(Exception):  # a rehearsal never fails a run
            for wanted in _worth(job):
                running.append(_start(wanted, _mark(job, wanted)))
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def _worth(job: Job) -> list[Wanted]:
    """The outputs of dense models that are still to be made on an accelerator with room to spare, where Triton has not
    compiled for such outputs before."""
    there = [output for output in job.outputs if output.method.undecided is None]
    unmade = [output for output in there if not output.folder.exists()]
    if job.device.type != "cuda" or job.decoder.shape.experts or job.recipe.model.trust_remote_code or not unmade:
        return []
    needs = needs_of(job, pending=unmade)
    room = (needs.device_free or 0) - needs.device_bytes
    config, dtype = read_config(job.source.path), next(iter(job.checkpoint.tensors.values())).dtype
    found = []
    for output in unmade:
        section = output.method.model_dump(mode="json") | (WEIGHED if output.imatrix else {})
        wanted = Wanted(config=config, dtype=str(dtype).removeprefix("torch."), outputs=[section],
                        device=str(job.device))  # fmt: skip
        if not _mark(job, wanted).exists():
            found.append(wanted)
    return found[: max(0, room // CONTEXT)]


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
