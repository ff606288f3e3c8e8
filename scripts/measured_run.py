"""`qtool plan` and `qtool run` of a recipe, and what the run took: seconds of the processors, memory of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KNOWN = ("MALLOC_PERTURB_", "0")  # glibc as it is: qtool leaves it alone where the user has set anything of it


@dataclass(frozen=True)
class Measured:
    """``seconds``: of the processors, user and system; ``anonymous`` and ``resident``: peaks in bytes; ``planned``: the
    plan's host memory; ``stages``: seconds of the clock."""

    seconds: float
    anonymous: int
    resident: int
    planned: int
    stages: Mapping[str, float]


def measure(work: Path, recipe: Mapping[str, Any], plan: bool = True, **environment: str) -> Measured:
    """In ``work``, an empty folder that is removed again, on two threads. Raises SystemExit where it fails."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "recipe.yaml").write_text(json.dumps(dict(recipe)))
    told = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"} | environment
    qtool = [sys.executable, "-P", "-m", "qtool"]
    planned = _run([*qtool, "plan", "recipe.yaml", "--json"], work, told)[0] if plan else '{"host_bytes": 0}'
    _, seconds = _run([*qtool, "run", "recipe.yaml", "--device", "cpu", "-q"], work, told)
    (result,) = work.glob("runs/*/result.json")
    found = json.loads(result.read_text())
    peaks, host = found["peaks"], json.loads(planned)["host_bytes"]
    shutil.rmtree(work)
    return Measured(seconds, peaks["anonymous"], peaks["resident"], host, found["stages"])


def _run(words: list[str], work: Path, environment: Mapping[str, str]) -> tuple[str, float]:
    """What it prints, and seconds of the processors: its own and of those that it waited for."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(words, cwd=work, env=dict(environment), stdout=out, stderr=err)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, err):
            file.seek(0)
        said, faults = (file.read().decode(errors="replace") for file in (out, err))
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}: {process.returncode}\n{faults[-2000:]}")
    return said, used.ru_utime + used.ru_stime


def load() -> str:
    """The machine's load over the last minute, and its cores."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
