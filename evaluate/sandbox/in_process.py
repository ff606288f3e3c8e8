"""Program and test in one process, for tests that share objects with the program (a unittest, own classes).

Such a program can cheat: whatever the test knows is in its memory. So these outcomes are marked in the scorecard, and
only the containment is as strong as elsewhere. The nonce keeps out forgers that do no more than write to every
descriptor; the exit code decides nothing.
"""

import inspect
import os
import sys
import types
import warnings
from typing import Any

from qtool.evaluate.sandbox import habits
from qtool.evaluate.sandbox.checker import reason_of
from qtool.evaluate.sandbox.frames import MAX_JOB, pack_json, read_frame, unpack_json, write_frame
from qtool.evaluate.sandbox.program_side import defined

_TESTS = ("TestCases", "check")
# Written after the test was found to be Python and before the program is loaded: what comes later may be the program's.
LOADING = ("alive", "loading")


def judge(program: str, job: dict[str, Any]) -> tuple[str, str]:
    """("passed" | "failed", short reason) for a program and its ``job`` (keys test, entry_point)."""
    import unittest  # before the program runs; a worker for such jobs has it already, the others do without

    module = types.ModuleType("__test__")
    module.__file__ = "__test__.py"
    sys.modules["__test__"] = module
    space = module.__dict__
    try:
        exec(compile(program, "candidate.py", "exec"), space)
    except BaseException as error:
        return "failed", f"while loading, {reason_of(error)}"
    try:
        candidate = defined(space, job["entry_point"])
    except BaseException as error:
        return "failed", reason_of(error)
    test = compile(job["test"], "test.py", "exec")
    space["candidate"] = space[job["entry_point"]] = candidate
    own = dict(space)  # what the program calls so is not the test
    try:
        exec(test, space)
        cases, check = (space.get(name) if space.get(name) is not own.get(name) else None for name in _TESTS)
        if isinstance(cases, type) and issubclass(cases, unittest.TestCase):
            return _run(cases, unittest)
        if callable(check) and inspect.isawaitable(running := check(candidate)):
            import asyncio  # as in checker

            asyncio.run(_awaited(running))
    except BaseException as error:
        return "failed", reason_of(error)
    return "passed", ""


async def _awaited(running: Any) -> None:
    await running


def _run(cases: Any, unittest: Any) -> tuple[str, str]:
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(cases).run(result)
    for case, trace in [*result.failures, *result.errors]:
        return "failed", f"{case.id().rpartition('.')[2]}: {trace.strip().splitlines()[-1][:200]}"
    if result.testsRun == 0:
        return "failed", "the test has no test methods"
    return ("passed", "") if result.wasSuccessful() else ("failed", "an expected failure did not happen")


def main(program: int, test: int, verdict: int, nonce: str) -> None:
    """Read program and job, judge, write ``[outcome, detail, nonce]`` frames: "alive" first, LOADING or, for a test
    that is no Python, "unjudged", then the outcome."""
    write_frame(verdict, pack_json(["alive", "", nonce]))
    texts = [read_frame(fd, MAX_JOB) for fd in (program, test)]
    if texts[0] is None or texts[1] is None:
        os._exit(1)
    warnings.simplefilter("ignore")
    habits.settle()
    # Libraries want a place for their caches; the folder is the job's own.
    os.environ.update({"HOME": os.getcwd(), "MPLCONFIGDIR": os.getcwd(), "MPLBACKEND": "Agg"})
    job = unpack_json(texts[1])
    try:
        compile(job["test"], "test.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        write_frame(verdict, pack_json(["unjudged", f"the test is not Python: {error}"[:600], nonce]))
        os._exit(0)
    write_frame(verdict, pack_json([*LOADING, nonce]))
    try:
        outcome = judge(unpack_json(texts[0])["program"], job)
        write_frame(verdict, pack_json([outcome[0], outcome[1][:600], nonce]))
    finally:
        os._exit(0)
