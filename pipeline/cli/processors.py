"""How many processors a command takes, and how its threads wait for each other: said in the environment, which OpenMP
reads once, when torch is loaded; child processes inherit it.

libgomp, which torch's wheels bring, takes as many threads as the process may run on, whatever a control group grants
(`cpu.max`), and lets a thread that waits spin for milliseconds. Beside one busy process it then spins its own time
slices away: AWQ and GPTQ of the demo model take 4 to 5 times as long (docs/benchmarks.md, "Beside other work"). 1000
turns, some 20 microseconds, and then sleeping costs an idle machine up to a quarter, and a busy one nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

POLICY, THREADS = "OMP_WAIT_POLICY", "OMP_NUM_THREADS"
WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}  # libgomp: turns; Intel's and LLVM's: milliseconds, not 200


def share_processors(environment: MutableMapping[str, str], system: Path = Path("/")) -> None:
    """Threads sleep soon, and are as many as the processors granted. What the user has set stays; ``system``: where
    /proc and /sys are."""
    if POLICY not in environment:
        for name, value in WAITING.items():
            environment.setdefault(name, value)
    if _quota(system) < _allowed():  # libgomp counts those that are allowed itself
        environment.setdefault(THREADS, str(granted(system)))


def granted(system: Path = Path("/")) -> int:
    """Processors that this process may keep busy."""
    return max(1, math.ceil(min(_allowed(), _quota(system))))


def share_of(number: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What each of ``number`` processes is told to take of the processors, where the user has said nothing else."""
    said = environment.get(THREADS)
    return {} if said not in (None, str(granted())) else {THREADS: str(max(1, granted() // number))}


def _allowed() -> int:
    """Processors that this process may run on (taskset, cpuset)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota(system: Path) -> float:
    """Processors' time that the control groups around this process grant it, infinite where none limits it."""
    groups, least = system / "sys/fs/cgroup", math.inf
    try:
        lines = (system / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return least
    for number, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        roots = [groups, groups / "unified"] if number == "0" else [groups / controllers, groups / "cpu"]
        for root in roots:
            inner = root / path.lstrip("/")
            for folder in (inner, *inner.parents):
                if folder == groups.parent:
                    break
                least = min(least, _granted(folder))
    return least


def _granted(group: Path) -> float:
    """Of one group: version 2's file, or version 1's two."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = [word for name in names for word in (group / name).read_text(encoding="ascii").split()]
            quota, period = int(words[0]), int(words[1])
        except (OSError, ValueError, IndexError):  # "max": no limit
            continue
        if quota > 0 and period > 0:  # version 1 says -1
            return quota / period
    return math.inf
