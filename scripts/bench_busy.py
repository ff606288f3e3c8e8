"""How much a busy machine slows a conversion, by how long OpenMP's idle threads spin.

    python scripts/bench_busy.py          # 4 settings, idle and beside 6 busy processes, 3 rounds
    python scripts/bench_busy.py --load 0 --spins default,1000 --rounds 5

AWQ and GPTQ of the demo model in a fresh `qtool run`, the settings in turn. One line a run: setting, busy processes
beside it, seconds, processor seconds, and the mean number of processors that others took meanwhile; then medians.
`default` is libgomp's own, `passive` is OMP_WAIT_POLICY=PASSIVE, a number GOMP_SPINCOUNT, `qtool` what qtool sets.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RECIPE = """model: qtool-demo
calibration: {{text: qtool-code, samples: {samples}, length: 256}}
outputs: [{{method: awq, group_size: 128}}, {{method: gptq, group_size: 128}}]
"""
BUSY = "while True: sum(range(100000))"
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def environment(spin: str) -> dict[str, str]:
    """Of a run with this setting: one that the user has set is not changed by qtool."""
    plain = {key: value for key, value in os.environ.items() if key not in CHOICES}
    chosen = {
        "default": {"GOMP_SPINCOUNT": "300000"},  # libgomp's, where it has as many processors as threads
        "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
        "qtool": {},
    }
    return plain | chosen.get(spin, {"GOMP_SPINCOUNT": spin})


@contextmanager
def busy(number: int) -> Iterator[None]:
    """So many processes that compute, of this process's priority."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def worked() -> float:
    """Processor seconds that all processes of the machine have used."""
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def run(spin: str, samples: int) -> tuple[float, float, float]:
    """(seconds, processor seconds, mean number of processors that others took)."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "r.yaml").write_text(RECIPE.format(samples=samples))
        begun, before, own = time.monotonic(), worked(), os.times()
        command = [sys.executable, "-P", "-m", "qtool", "run", "r.yaml", "--device", "cpu"]
        subprocess.run(command, cwd=folder, env=environment(spin), check=True, capture_output=True)
        seconds, now = time.monotonic() - begun, os.times()
    used = now.children_user + now.children_system - own.children_user - own.children_system
    return seconds, used, (worked() - before - used) / seconds


def main() -> None:
    """Print a line a run, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", default="default,passive,1000,qtool")
    parser.add_argument("--load", default="0,6", help="busy processes beside the run")
    parser.add_argument("--samples", type=int, default=32, help="of calibration, 256 tokens each")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[tuple[int, str], list[tuple[float, float, float]]] = {}
    for _ in range(options.rounds):
        for number in map(int, options.load.split(",")):
            for spin in options.spins.split(","):
                with busy(number):
                    figures = run(spin, options.samples)
                found.setdefault((number, spin), []).append(figures)
                print(f"{spin:>8} {number:3}" + "".join(f"{figure:8.1f}" for figure in figures), flush=True)
    print("medians: setting, busy processes, seconds, processor seconds, processors of others")
    for (number, spin), runs in sorted(found.items()):
        medians = [statistics.median(column) for column in zip(*runs, strict=True)]
        print(f"{spin:>8} {number:3}" + "".join(f"{median:8.1f}" for median in medians))


if __name__ == "__main__":
    main()
