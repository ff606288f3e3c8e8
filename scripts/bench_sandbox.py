"""How many short programs a second the sandbox judges here, by how they are judged and by tier.

    python scripts/bench_sandbox.py [--jobs 400] [--workers N]

Wall time from the call to the last outcome, workers' start included; every outcome is checked.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import time
from dataclasses import replace

from qtool import QtoolError
from qtool.evaluate.sandbox.execute import TIERS, Job, detect_sandbox, run_programs

CALL = Job(
    "call",
    "def double(xs):\n    return [2 * x for x in xs]\n",
    "def check(candidate):\n" + "".join(f"    assert candidate([{i}]) == [{2 * i}]\n" for i in range(8)),
    "double",
)
KINDS = {
    "call": CALL,
    "stdin": replace(
        CALL,
        program="n = int(input())\nprint(2 * n)\n",
        test="def check(candidate):\n    assert candidate('4') == '8\\n'\n",
        run="stdin",
    ),
    "in_process": replace(CALL, run="in_process"),
    "in_process, numpy": replace(
        CALL, program="import numpy as np\ndef double(xs):\n    return (2 * np.array(xs)).tolist()\n", run="in_process",
        libraries=("numpy",),
    ),
    "javascript": replace(
        CALL, program="const double = (xs) => xs.map((x) => 2 * x);",
        test="const assert = require('node:assert'); assert.deepEqual(double([1, 2]), [2, 4]);", language="javascript",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=400)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; {arguments.jobs} jobs, median [rounds]")
    for tier in [*TIERS, "none"]:
        try:
            print(f"{tier}: {detect_sandbox(tier)}")
        except QtoolError as error:
            print(f"{tier}: not here ({error.message[:100]}...)")
            continue
        for kind, job in KINDS.items():
            if job.language == "javascript" and shutil.which("node") is None:
                continue
            count = arguments.jobs if job.language == "python" else max(1, arguments.jobs // 8)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            rates = [rate([job] * count, tier, arguments.workers) for _ in range(arguments.rounds)]
            shown = ", ".join(f"{value:.0f}" for value in rates)
            cost = spent(before, count * arguments.rounds)
            print(f"  {kind:<20} {statistics.median(rates):6.0f} a second [{shown}], {cost} a job")


def rate(jobs: list[Job], tier: str, workers: int | None) -> float:
    """Jobs a second; every one must pass."""
    started = time.perf_counter()
    outcomes = run_programs(jobs, timeout=30.0, sandbox=tier, workers=workers)
    seconds = time.perf_counter() - started
    wrong = [outcome for outcome in outcomes if not outcome.passed]
    if wrong:
        raise SystemExit(f"{len(wrong)} right programs did not pass: {wrong[0]}")
    return len(jobs) / seconds


def spent(before: resource.struct_rusage, jobs: int) -> str:
    """What the workers took since ``before``: other load on the machine changes it less than the time."""
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime
    faults = now.ru_minflt - before.ru_minflt
    return f"{1000 * seconds / jobs:.1f} ms of processor time, {faults / jobs:.0f} page faults"


if __name__ == "__main__":
    main()
