"""`qtool plan` and `qtool run` of a recipe, and what the run took: seconds of the processors, memory of its own."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
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


def measure(work: Path, recipe: Mapping[str, Any], python: str = sys.executable, **environment: str) -> Measured:
    """In ``work``, an empty folder that is removed again, on two threads. Raises SystemExit where it fails."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "recipe.yaml").write_text(json.dumps(dict(recipe)))
    told = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"} | environment
    qtool = [python, "-P", "-m", "qtool"]
    planned = _run([*qtool, "plan", "recipe.yaml", "--json"], work, told)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _run([*qtool, "run", "recipe.yaml", "--device", "cpu", "-q"], work, told)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (result,) = work.glob("runs/*/result.json")
    found = json.loads(result.read_text())
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peaks, host = found["peaks"], json.loads(planned)["host_bytes"]
    shutil.rmtree(work)
    return Measured(seconds, peaks["anonymous"], peaks["resident"], host, found["stages"])


def _run(words: list[str], work: Path, environment: Mapping[str, str]) -> str:
    done = subprocess.run(words, cwd=work, env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def load() -> str:
    """The machine's load over the last minute, and its cores."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
