"""The process that runs the benchmark's asserts and alone decides. ``candidate(...)`` is a call over a pipe.

What comes back is decoded to plain builtin values (see wire), so a comparison in the test is Python's own.
"""

import builtins
import linecache
import os
import select
import traceback
import types
import warnings
from typing import Any

from qtool.evaluate.wire import MAX_JOB, NotPlain, pack, read_frame, unpack, write_frame


class CandidateLost(BaseException):
    """The candidate died or broke the protocol. Not an Exception: a test's `except` must not hide it."""


class BrokenTest(BaseException):
    """The test itself cannot run here (it passes a function to the candidate): nobody's wrong answer."""


class Candidate:
    """Stands for the function under test: call it like the function. ``seconds`` bounds one call."""

    def __init__(self, calls: int, replies: int, seconds: float | None = None) -> None:
        self._calls = calls
        self._replies = replies
        self._seconds = seconds
        self.count = 0
        self.late = False
        self.fault: str | None = None

    def wait_ready(self) -> None:
        """Block until the program is loaded. Raises CandidateLost with the reason if it could not be."""
        try:
            self._receive()
        except CandidateLost as error:
            # Said before any of the program ran: the sandbox is at fault, not the answer.
            raise BrokenTest("the candidate's process could not be locked down") from error
        reply = self._receive()
        if reply.get("ready") is not True:
            raise self._lost("while loading, " + str(_raised(reply)[1]))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fault is not None:
            raise CandidateLost(self.fault)
        self.count += 1
        try:
            request = pack([list(args), kwargs])
        except NotPlain as error:
            raise BrokenTest(f"the test passes {error} to the candidate") from error
        try:
            write_frame(self._calls, request)
        except OSError:
            raise self._lost("the candidate's process ended") from None
        if self._seconds is not None and not select.select([self._replies], [], [], self._seconds)[0]:
            self.late = True
            raise self._lost(f"no answer to a call after {self._seconds:g} s")
        reply = self._receive()
        if "refused" in reply:
            raise self._lost(f"returned {str(reply['refused'])[:200]}")
        if "raised" in reply:
            name, message = _raised(reply)
            kind = getattr(builtins, name, None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, ExceptionGroup):
                raise self._lost(message)
            raise _exception(kind, message)
        if "value" not in reply:
            raise self._lost("the candidate broke the protocol")
        self._copy_back(args, reply.get("changed"))
        return reply["value"]

    def _receive(self) -> dict[str, Any]:
        try:
            data = read_frame(self._replies)
            reply = None if data is None else unpack(data)
        except NotPlain as error:
            raise self._lost(f"the candidate broke the protocol: {error}") from None
        if data is None:
            raise self._lost("the candidate's process ended")
        if type(reply) is not dict:
            raise self._lost("the candidate broke the protocol")
        return reply

    def _lost(self, reason: str) -> CandidateLost:
        self.fault = reason[:400]
        return CandidateLost(self.fault)

    def _copy_back(self, args: tuple[Any, ...], changed: Any) -> None:
        for index, new in changed.items() if type(changed) is dict else ():
            old: Any = args[index] if type(index) is int and 0 <= index < len(args) else None
            if type(old) is not type(new):
                raise self._lost("the candidate broke the protocol")
            if isinstance(old, (list, bytearray)):
                old[:] = new
            elif isinstance(old, (dict, set)):
                old.clear()
                old.update(new)


def judge(job: dict[str, Any], candidate: Candidate) -> tuple[str, str]:
    """("passed" | "failed" | "timeout" | "error", short reason) for ``job`` (keys test, entry_point, setup)."""
    module = types.ModuleType("test")
    space = module.__dict__
    _define_setup(job["setup"], space)
    space["candidate"] = space[job["entry_point"]] = candidate
    before = space.get("check")  # the function asked for, or a helper of that name: not the test's
    try:
        code = compile(job["test"], "test.py", "exec")
    except (SyntaxError, ValueError) as error:
        return "error", f"the test is not Python: {error}"
    # Lets a traceback quote the assert that failed.
    linecache.cache["test.py"] = (len(job["test"]), None, job["test"].splitlines(True), "test.py")
    try:
        candidate.wait_ready()
        exec(code, space)
        check = space.get("check")
        if callable(check) and check is not before:
            check(candidate)
    except BrokenTest as error:
        return "error", str(error)
    except BaseException as error:
        if candidate.count == 0 and candidate.fault is None:
            return "error", f"the test failed before it called the candidate: {reason_of(error)}"
        return "timeout" if candidate.late else "failed", candidate.fault or reason_of(error)
    if candidate.fault is not None:
        return "failed", candidate.fault
    if candidate.count == 0:
        return "error", "the test never called the candidate"
    return "passed", ""


def _define_setup(setup: str, space: dict[str, Any]) -> None:
    """Run the prompt (imports, helpers, the function's header): published tests use its helpers."""
    for ending in ("", "\n    pass\n", "\n\tpass\n"):
        try:
            code = compile(setup + ending, "prompt.py", "exec")
        except (SyntaxError, ValueError):
            continue
        exec(code, space)
        return


def _raised(reply: dict[str, Any]) -> tuple[str, str]:
    raised = reply.get("raised")
    if type(raised) is list and len(raised) == 2 and all(type(part) is str for part in raised):
        return raised[0], raised[1][:400]
    return "", "the candidate broke the protocol"


def _exception(kind: type[Exception], message: str) -> Exception:
    try:
        return kind(message)
    except TypeError:
        # UnicodeDecodeError and its like want five arguments.
        return kind.__new__(kind)


def reason_of(error: BaseException) -> str:
    """The exception, and the test's line that it came from, in a line."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "test.py"]
    where = f" at `{lines[-1].line}`" if lines else ""
    try:
        text = str(error)
    except BaseException:
        text = "?"
    return f"{type(error).__name__}{': ' + text[:200] if text else ''}{where[:200]}"


def main(test: int, calls: int, replies: int, verdict: int) -> None:
    """Read the job from ``test``, judge it, write one frame ``[outcome, detail]`` to ``verdict``."""
    data = read_frame(test, MAX_JOB)
    if data is None:
        os._exit(1)
    warnings.simplefilter("ignore")
    try:
        job = unpack(data)
        outcome = judge(job, Candidate(calls, replies, job["call_seconds"]))
    except BaseException as error:
        outcome = "error", f"the checker failed: {type(error).__name__}: {str(error)[:200]}"
    write_frame(verdict, pack([outcome[0], outcome[1][:600]]))
    os._exit(0)
