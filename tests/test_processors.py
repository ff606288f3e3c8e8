"""What qtool says to OpenMP: found in a real process before torch is loaded, and read from planted control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qtool.cli.processors import THREADS, granted, share_of, share_processors

HERE = len(os.sched_getaffinity(0))
CHILD = """
import os, subprocess, sys
from qtool.cli import main
try:
    main(["run", "no such recipe"], standalone_mode=False)
except Exception:
    pass
import torch
show = [sys.executable, "-c", "import os; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('KMP_BLOCKTIME'))"]
print(subprocess.check_output(show, text=True).strip(), torch.get_num_threads())
"""


def of_process(**settings: str) -> tuple[str, str]:
    """(what a child of a qtool command finds; what libgomp says that it has read)."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-P", "-c", CHILD]
    shown = plain | {"OMP_DISPLAY_ENV": "VERBOSE"} | settings
    done = subprocess.run(command, env=shown, capture_output=True, text=True, check=True)
    spin = next((line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line), "")
    return done.stdout.strip(), spin


@pytest.mark.slow
def test_openmp_has_read_it() -> None:
    said, spin = of_process()
    assert said == f"1000 1 {HERE}"
    assert spin == "1000"


@pytest.mark.slow
def test_what_the_user_set_stays() -> None:
    assert of_process(GOMP_SPINCOUNT="77", OMP_NUM_THREADS="1") == ("77 1 1", "77")
    said, spin = of_process(OMP_WAIT_POLICY="PASSIVE")
    assert said == f"None None {HERE}"
    assert spin == "0"


def threads(system: Path, groups: str, files: dict[str, str]) -> str | None:
    """OMP_NUM_THREADS on a machine with these control groups."""
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{n}": text for n, text in files.items()}}.items():
        (system / name).parent.mkdir(parents=True, exist_ok=True)
        (system / name).write_text(text)
    environment: dict[str, str] = {}
    share_processors(environment, system)
    return environment.get("OMP_NUM_THREADS")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, "1"),  # a container
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, "2"),  # a group around it
        ("4:cpu,cpuacct:/x\n0::/\n", {"cpu/cpu.cfs_quota_us": "20000", "cpu/cpu.cfs_period_us": "100000"}, "1"),
        ("4:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, None),
        ("3:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "1000", "cpuset/cpu.cfs_period_us": "100000"}, None),
        ("no line of a control group\n0::/\n", {"cpu.max": "no number\n"}, None),
    ],
)
def test_the_processors_that_are_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], expected: str | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert threads(tmp_path, groups, files) == expected


def test_a_quota_above_the_processors_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert threads(tmp_path, "0::/\n", {"cpu.max": "400000 100000\n"}) is None


def test_ranks_share_the_processors() -> None:
    """What the user has said stays; what was found here is divided."""
    found = granted()
    assert share_of(2, {}) == share_of(2, {THREADS: str(found)}) == {THREADS: str(max(1, found // 2))}
    assert share_of(10**6, {}) == {THREADS: "1"}
    assert share_of(2, {THREADS: str(found + 1)}) == {}
