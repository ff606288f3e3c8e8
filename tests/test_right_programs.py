"""False negatives: unusual programs that are right must pass, and their wrong twins must not. The programs are data."""

import json
import shutil

import pytest
import right_call
import right_javascript
import right_stdin

from qtool import QtoolError
from qtool.evaluate.sandbox.execute import Job, detect_sandbox, run_programs
from qtool.evaluate.tasks.livecodebench import _STDIN_TEST


def sandboxed() -> bool:
    try:
        return bool(detect_sandbox())
    except QtoolError:
        return False


pytestmark = pytest.mark.skipif(not sandboxed(), reason="no sandbox on this machine")


def call_jobs() -> tuple[list[Job], list[Job]]:
    right = [Job(n, p, t, "f", right_call.SETUPS.get(n, "")) for n, (p, t) in right_call.PROGRAMS.items()]
    wrong = [Job(n, p, t, "f", right_call.WRONG_SETUPS.get(n, "")) for n, (p, t) in right_call.WRONG.items()]
    return right, wrong


def stdin_jobs() -> tuple[list[Job], list[Job]]:
    test = f"TESTS = {json.dumps(right_stdin.CASES)!r}\n{_STDIN_TEST}"
    kinds = right_stdin.PROGRAMS, right_stdin.WRONG
    right, wrong = ([Job(n, p, test, "main", run="stdin") for n, p in kind.items()] for kind in kinds)
    return right, wrong


def javascript_jobs() -> tuple[list[Job], list[Job]]:
    kinds = right_javascript.PROGRAMS, right_javascript.WRONG
    right, wrong = ([Job(n, p, t, "f", language="javascript") for n, (p, t) in kind.items()] for kind in kinds)
    return right, wrong


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["call", "stdin", "javascript"])
def test_right_programs_pass_and_wrong_ones_fail(mode: str) -> None:
    if mode == "javascript" and shutil.which("node") is None:
        pytest.skip("node is not installed")
    right, wrong = {"call": call_jobs, "stdin": stdin_jobs, "javascript": javascript_jobs}[mode]()
    outcomes = run_programs([*right, *wrong], timeout=30.0)
    assert [outcome for outcome in outcomes[: len(right)] if not outcome.passed] == []
    assert [outcome for outcome in outcomes[len(right) :] if outcome.outcome != "failed"] == []


def test_there_are_many() -> None:
    assert sum(len(jobs()[0]) for jobs in (call_jobs, stdin_jobs, javascript_jobs)) >= 240


def test_what_only_its_own_class_could_compare_is_said() -> None:
    program, test = right_call.WRONG["equal to all"]
    (outcome,) = run_programs([Job("a", program, test, "f")])
    assert outcome.detail == "not decided: returned a Odd, and only its own class could compare it"
