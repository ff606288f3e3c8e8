"""Judge programs that nobody trusts: each in a sandbox, with the asserts in a process it cannot reach.

A worker (see worker) is a bare interpreter in namespaces of its own; for every job it forks a candidate,
which gets the program, and a checker, which gets the test and calls the candidate over a pipe. This side only
hands out jobs, collects outcomes and replaces workers that stopped answering.
"""

import functools
import importlib.resources
import importlib.util
import os
import queue
import shutil
import sysconfig
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qtool import QtoolError
from qtool.evaluate.sandbox.cell import Kit
from qtool.evaluate.sandbox.frames import NotPlain
from qtool.evaluate.sandbox.process import START_SECONDS, Job, Outcome, Worker, WorkerLost

__all__ = ["TIERS", "Job", "Outcome", "Worker", "WorkerLost", "detect_sandbox", "run_programs"]

TIERS = ("namespaces", "bubblewrap", "landlock")


def run_programs(
    jobs: Sequence[Job],
    *,
    timeout: float = 5.0,
    workers: int | None = None,
    sandbox: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Outcomes in the order of ``jobs``.

    ``timeout``: wall seconds for one job (one with longer ``seconds`` has those). ``workers``: jobs at a time, default
    one for each core. ``sandbox``: "auto" (the strongest the machine offers), "namespaces", "bubblewrap", "landlock",
    or "none" (resource limits only: for programs you would run yourself). ``progress`` is called in this thread with
    the number of jobs done.
    Raises QtoolError: exit 3 where the sandbox is not available, exit 2 for a senseless argument.
    """
    if timeout <= 0:
        raise QtoolError(f"timeout must be above 0 seconds, got {timeout:g}.")
    if workers is not None and workers < 1:
        raise QtoolError(f"workers must be at least 1, got {workers}.")
    tier = _choose(sandbox)[0]
    if not jobs:
        return []
    kit = kit_for(jobs)
    if replace(kit, unittest=False) != Kit():
        _try_kit(tier, kit)
    count = min(workers or _cores(), len(jobs))
    results: queue.SimpleQueue[tuple[int, Outcome | BaseException]] = queue.SimpleQueue()
    pending = enumerate(jobs)
    lock, stop = threading.Lock(), threading.Event()

    def take() -> tuple[int, Job] | None:
        with lock:
            return None if stop.is_set() else next(pending, None)

    started: list[Worker] = []
    threads = [
        threading.Thread(target=_work, args=(tier, timeout, kit, take, results, stop, started), daemon=True)
        for _ in range(count)
    ]
    outcomes: dict[int, Outcome] = {}
    try:
        for thread in threads:
            thread.start()
        while len(outcomes) < len(jobs):
            index, outcome = results.get()
            if isinstance(outcome, BaseException):
                raise outcome
            outcomes[index] = outcome
            if progress is not None:
                progress(len(outcomes))
    finally:
        # On an interrupt too: every worker ends with its thread, and a program that still runs is not waited for.
        stop.set()
        for worker in started if len(outcomes) < len(jobs) else ():
            worker.kill()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    return [outcomes[index] for index in range(len(jobs))]


def detect_sandbox(sandbox: str = "auto") -> str:
    """The measures that ``run_programs`` would take here, in words, for the scorecard. Raises as it does."""
    return _choose(sandbox)[1]


def kit_for(jobs: Sequence[Job]) -> Kit:
    """What the jobs need beyond a bare interpreter. Raises QtoolError (exit 3) if node is needed and not there."""
    libraries = tuple(sorted({library for job in jobs for library in job.libraries}))
    # Where they lie: also beside the environment's own folder (a user's site, one linked by a .pth).
    specs = (importlib.util.find_spec(name) for name in libraries)
    beside = {str(Path(spec.origin).parent.parent) for spec in specs if spec and spec.origin and spec.parent}
    own = {sysconfig.get_path(name) for name in ("purelib", "platlib")} if libraries else set()
    folders = tuple(sorted(own | beside))
    unittest = any(job.run == "in_process" for job in jobs)
    if all(job.language == "python" for job in jobs):
        return Kit(libraries, folders, unittest=unittest)
    node = shutil.which("node")
    if node is None:
        raise QtoolError(
            "judging JavaScript needs node, which is not installed. Install Node.js 18 or newer (Debian: apt install "
            "nodejs), or leave the JavaScript task out.",
            exit_code=3,
        )
    script = importlib.resources.files("qtool.evaluate").joinpath("data/sandbox.js").read_text(encoding="utf-8")
    return Kit(libraries, folders, os.path.realpath(node), script, unittest)


@functools.cache
def _try_kit(tier: str, kit: Kit) -> None:
    """Judge one right JavaScript program. Raises QtoolError (exit 3) where node does not run in the sandbox."""
    if kit.node is None:
        return
    one = Job("probe", "function f(x) { return x + 1; }", "if (f(1) !== 2) throw Error();", "f", language="javascript")
    try:
        with Worker(tier, START_SECONDS, kit) as worker:
            outcome = worker.judge(one)
    except WorkerLost as error:
        outcome = Outcome("probe", "error", str(error))
    if not outcome.passed:
        raise QtoolError(
            f"{kit.node} does not run in the sandbox ({tier}: {outcome.outcome}, {outcome.detail}). Try another "
            "version of Node.js, or leave the JavaScript task out.",
            exit_code=3,
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _choose(sandbox: str) -> tuple[str, str]:
    """(tier, description) of the strongest tier that really judges a right and a wrong program here."""
    if sandbox not in ("auto", "none", *TIERS):
        raise QtoolError(f"sandbox must be one of auto, {', '.join(TIERS)}, none; got {sandbox!r}.")
    reasons: list[str] = []
    for tier in TIERS if sandbox == "auto" else (sandbox,):
        try:
            with Worker(tier, START_SECONDS) as worker:
                _probe(worker)
                # a weaker tier than could be hoped for is not taken without a word
                why = f" (no {'; no '.join(reasons)})" if reasons else ""
                return tier, worker.description + why
        except WorkerLost as error:
            reasons.append(f"{tier}: {error}")
    raise QtoolError(
        "no sandbox for judging generated programs on this machine (" + "; ".join(reasons) + "). "
        "Install bubblewrap or allow user namespaces or Landlock (in a container: its seccomp profile), "
        "or set `sandbox: none` to run them with resource limits only, at your own risk.",
        exit_code=3,
    )


def _work(
    tier: str,
    timeout: float,
    kit: Kit,
    take: Callable[[], tuple[int, Job] | None],
    results: "queue.SimpleQueue[tuple[int, Outcome | BaseException]]",
    stop: threading.Event,
    started: list[Worker],
) -> None:
    """Judge jobs until there are none. A lost worker is replaced and its job tried once more."""
    worker: Worker | None = None
    index = -1
    try:
        for index, job in iter(take, None):
            outcome = Outcome(job.task_id, "error", "not run")
            for _ in range(2):
                if stop.is_set():
                    break
                try:
                    if worker is None:
                        worker = Worker(tier, timeout, kit)
                        started.append(worker)
                        if stop.is_set():
                            break
                    outcome = worker.judge(job)
                    break
                except (WorkerLost, NotPlain, OSError) as error:
                    outcome = Outcome(job.task_id, "error", f"sandbox: {error}")
                    if worker is not None:
                        worker.close()
                    worker = None
            results.put((index, outcome))
    except BaseException as error:
        # Raised again in the caller's thread, which would wait for this result for ever.
        results.put((index, error))
    finally:
        if worker is not None:
            worker.close()


def _probe(worker: Worker) -> None:
    """The worker judges one right and one wrong answer, and can still import: or it is of no use."""
    test = "def check(candidate):\n    assert candidate(20) == 21\n"
    for step, expected in ((1, "passed"), (2, "failed")):
        # colorsys: some module that no worker has imported beforehand.
        program = f"def f(x):\n    import colorsys\n    return x + {step}\n"
        outcome = worker.judge(Job("probe", program, test, "f"))
        if outcome.outcome != expected:
            raise WorkerLost(f"a probe that should have {expected} ended with {outcome.outcome} ({outcome.detail})")
