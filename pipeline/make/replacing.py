"""`--force`: artifacts of another recipe make room, and are gone once the new ones are finished, not before."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qtool.convert.files.durable import naming
from qtool.convert.files.manifest import MANIFEST, read_manifest
from qtool.make.job import Job, keys_by_threads
from qtool.make.outputs import MOST_THREADS
from qtool.quantize.calibration import CalibrationSet
from qtool.runs import log

ASIDE = ".replaced"


@contextmanager
def replacing(job: Job, calibration: CalibrationSet, force: bool) -> Iterator[None]:
    """Around the making of artifacts. With ``force`` those of other recipes, sources or versions are moved aside; what
    another tool wrote is never touched. At the end what was moved aside, now or in a session that was interrupted, is
    deleted. Raises QtoolError (exit 3)."""
    for output in job.outputs if force else ():
        if (output.folder / MANIFEST).exists():
            keys = keys_by_threads(job, output, calibration, [torch.get_num_threads(), *range(1, MOST_THREADS + 1)])
            if read_manifest(output.folder).key not in keys:
                _move_aside(output.folder)
    yield
    for output in job.outputs:
        aside = output.folder.with_name(output.folder.name + ASIDE)
        if (aside / MANIFEST).exists():
            with naming(aside):
                shutil.rmtree(aside)


def _move_aside(folder: Path) -> None:
    aside = folder.with_name(folder.name + ASIDE)
    log.say(
        f"{folder}: another recipe's artifact; it is deleted when the new one is finished (until then {aside.name})"
    )
    with naming(aside):
        if (aside / MANIFEST).exists():
            shutil.rmtree(aside)
        folder.rename(aside)
