"""The engine `ray`: tasks of a Ray cluster that is there already, on a file system that its nodes share.

https://docs.ray.io/en/latest/ray-core/fault-tolerance.html: Ray starts a task again whose worker or node died.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from qtool.batch.engine import Engine, Place, Rendered, Task, here_command
from qtool.recipe.section import Positive, Section, Text

FILE, JOBS = "ray_jobs.py", "ray.json"
PROGRAM = '''"""Every model of ray.json as a task of a Ray cluster: `python ray_jobs.py`, with a Python that has ray.

A task whose process died is started again, and goes on where it stopped. Ends with 1 where any failed.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ray


def work(words, home, threads):
    """The exit code. What a kill ended is raised, so that Ray starts it again; a gate that failed is an answer."""
    told = {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(words, cwd=home, env={**os.environ, **told}, start_new_session=True)
    try:
        code = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    if code < 0 or code > 128:
        raise RuntimeError(f"was ended by signal {abs(code) % 128}")
    return code


def main():
    jobs = json.loads(Path(__file__).with_name("ray.json").read_text(encoding="utf-8"))
    ray.init(address=jobs["address"], log_to_driver=True)
    remote = ray.remote(max_retries=jobs["retries"], retry_exceptions=True)(work)
    running = {}
    for job in jobs["jobs"]:
        needs = {"num_cpus": job["processors"], "num_gpus": job["cards"], "memory": job["memory"]}
        task = remote.options(name=job["name"], **needs).remote(job["words"], jobs["home"], job["processors"])
        running[task] = job["name"]
    failed = 0
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        name = running.pop(done)
        try:
            said = ray.get(done)
        except Exception as error:
            said = str(error).strip().splitlines()[-1]
        failed += said != 0
        print(f"{name}: {'finished' if said == 0 else f'ended with {said}'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
'''


class RaySection(Section):
    """`ray:` tasks of a cluster that is there. Nodes share this machine's file system, and qtool's Python."""

    address: Text = "auto"
    """Of the cluster; `auto` finds the one that this machine belongs to."""
    retries: Positive = 10
    """How often a task that died is started again."""


def _render(tasks: Sequence[Task], place: Place, section: RaySection) -> Rendered:
    jobs = [
        {
            "name": task.name, "processors": task.needs.processors,
            "cards": task.needs.cards if task.needs.card else 0, "memory": task.needs.host_bytes,
            "words": [*here_command(), "run", str(place.folder / task.file), *task.options(place.runs)],
        }
        for task in tasks
    ]  # fmt: skip
    told = {"address": section.address, "retries": section.retries, "home": str(place.home), "jobs": jobs}
    files = {FILE: PROGRAM, JOBS: json.dumps(told, indent=1) + "\n"}
    return Rendered(files, [[_python(), FILE]])


def _python() -> str:
    """One that has ray: this one, or the one beside the program `ray`."""
    if importlib.util.find_spec("ray") is not None:
        return sys.executable
    program = shutil.which("ray")
    beside = Path(program).parent / "python" if program else None
    return str(beside) if beside and beside.exists() else "python"


RAY = Engine("ray", RaySection, _render, "ray", "pip install ray, in an environment of its own or in qtool's")
