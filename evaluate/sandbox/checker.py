"""The process that runs the benchmark's asserts and alone decides. ``candidate(...)`` is a call over a pipe.

What comes back is decoded to plain values (see wire), so a comparison in the test is Python's own; what is not plain
stays where it is (see remote).
"""

import inspect
import json
import linecache
import os
import select
import sys
import traceback
import types
import warnings
from typing import Any

from qtool.evaluate.sandbox import wire
from qtool.evaluate.sandbox.frames import MAX_JOB, NotPlain, pack_json, read_frame, unpack_json, write_frame
from qtool.evaluate.sandbox.line import Line, Lost, basis
from qtool.evaluate.sandbox.remote import Remote, remote
from qtool.evaluate.sandbox.wire import NAME_IN_TESTS, Reader, Writer

sys.modules[NAME_IN_TESTS] = wire


class BrokenTest(BaseException):
    """The test itself cannot run here (it passes what cannot cross): nobody's wrong answer."""


class NotStarted(BaseException):
    """The sandbox did not hold the candidate's process."""


class TestSide(Line):
    """The test's end. ``seconds`` bounds one answer. It does nothing for the program but call the functions that the
    test passed to it."""

    own_side = True

    def __init__(self, calls: int, replies: int, seconds: float | None = None) -> None:
        super().__init__(replies, calls)
        self._replies = replies
        self._seconds = seconds
        self._remotes: dict[int, Any] = {}
        self.uses = 0
        self.late = False
        self.fault: str | None = None

    def wait_ready(self) -> None:
        """Block until the program is loaded. Raises Lost with the reason if it could not be."""
        try:
            self._word()
        except Lost as error:
            # Said before any of the program ran: the sandbox is at fault, not the answer.
            raise NotStarted("the candidate's process could not be locked down") from error
        if (word := self._word()) != "ready":
            raise self.lost(word)

    def share_classes(self, space: dict[str, Any]) -> None:
        """Instances of the classes that the problem itself defines travel as their fields: here they are the problem's
        own again."""
        own = {name: kind for name, kind in space.items() if isinstance(kind, type) and kind.__module__ == "test"}
        told = {name: basis(kind) for name, kind in own.items()}
        names = self.ask("classes", 0, (told,)) if own else []
        self.classes = {name: own[name] for name in names if name in own}

    def ask(self, operation: str, target: int, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if self.fault is not None:
            raise Lost(self.fault)
        try:
            return super().ask(operation, target, args, kwargs)
        except NotPlain as error:
            raise BrokenTest(f"the test passes {error} to the candidate") from error

    def receive(self, reader: Reader) -> tuple[Any, ...]:
        if self._seconds is not None and not select.select([self._replies], [], [], self._seconds)[0]:
            self.late = True
            raise self.lost(f"no answer to a call after {self._seconds:g} s")
        return super().receive(reader)

    def lost(self, reason: str) -> Lost:
        self.fault = self.fault or reason[:400]
        return Lost(self.fault)

    def perform(self, operation: str, target: Any, args: Any, kwargs: Any) -> Any:
        if operation not in ("__call__", "__next__") or type(args) is not tuple or type(kwargs) is not dict:
            raise self.lost("the candidate broke the protocol")
        try:
            value = self.kept(target)
        except NotPlain:
            raise self.lost("the candidate broke the protocol") from None
        return next(value) if operation == "__next__" else value(*args, **kwargs)

    def spell_other(self, value: Any, writer: Writer) -> Any:
        kind = type(value)
        if isinstance(vars(kind).get("_handle"), int) or isinstance(value, (Remote, Candidate)):
            return ["home", value._handle]
        known = kind.__module__ in ("builtins", "functools", "operator", "itertools")
        if known and callable(value) and not isinstance(value, type):
            return ["function", self.keep(value)]
        if known and hasattr(kind, "__next__"):
            return ["iterator", self.keep(value)]
        raise NotPlain(f"a {kind.__name__}, not a plain value")

    def make_other(self, tag: str, rest: list[Any], reader: Reader) -> Any:
        if tag != "kept" or type(rest[0]) is not int:
            raise NotPlain("not a value (unknown tag)")
        traits = reader.value(rest[1])
        if rest[0] not in self._remotes:
            made = remote(self, rest[0], traits)
            if not isinstance(made, Remote):
                return made
            self._remotes[rest[0]] = made
        return self._remotes[rest[0]]

    def _word(self) -> str:
        try:
            data = read_frame(self._replies)
            word = None if data is None else unpack_json(data)
        except NotPlain as error:
            raise self.lost(f"the candidate broke the protocol: {error}") from None
        if word is None:
            raise self.lost("the candidate's process ended")
        if type(word) is not str:
            raise self.lost("the candidate broke the protocol")
        return word


class Candidate:
    """Stands for the function under test: call it like the function."""

    _line: TestSide
    _handle = 0
    _ASKED = ("__doc__", "__wrapped__", "__annotations__", "__defaults__", "__kwdefaults__", "__qualname__")

    def __init__(self, line: TestSide, name: str) -> None:
        vars(self).update(_line=line, __name__=name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._line.uses += 1
        return self._line.ask("__call__", 0, args, kwargs)

    def __getattribute__(self, name: str) -> Any:
        if name in Candidate._ASKED:
            return self.__getattr__(name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in self._ASKED:
            raise AttributeError(name)
        self._line.uses += 1
        return self._line.ask("get", 0, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._line.ask("set", 0, (name, value))

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Remote) and self._line.ask("is a", 0, (value,)) is True


def judge(job: dict[str, Any], line: TestSide) -> tuple[str, str]:
    """(outcome as in process.Outcome, short reason) for ``job`` (keys test, entry_point, setup)."""
    module = types.ModuleType("test")
    space = module.__dict__
    _define_setup(job["setup"], space)
    candidate = Candidate(line, job["entry_point"])
    space["candidate"] = space[job["entry_point"]] = candidate
    before = space.get("check")  # the function asked for, or a helper of that name: not the test's
    try:
        code = compile(job["test"], "test.py", "exec")
    except (SyntaxError, ValueError) as error:
        return "unjudged", f"the test is not Python: {error}"
    # Lets a traceback quote the assert that failed.
    linecache.cache["test.py"] = (len(job["test"]), None, job["test"].splitlines(True), "test.py")
    try:
        line.wait_ready()
    except NotStarted as error:
        return "error", str(error)
    except Lost as error:
        return "failed", str(error)
    try:
        line.share_classes(space)
        exec(code, space)
        check = space.get("check")
        if callable(check) and check is not before and inspect.isawaitable(running := check(candidate)):
            import asyncio  # few tests need it, and every process of a worker would carry it

            asyncio.run(_wait(running))
    except BrokenTest as error:
        return "unjudged", str(error)
    except BaseException as error:
        if line.uses == 0 and line.fault is None:
            return "unjudged", f"the test failed before it called the candidate: {reason_of(error)}"
        return "timeout" if line.late else "failed", line.fault or reason_of(error)
    if line.fault is not None:
        return "failed", line.fault
    if line.uses == 0:
        return "unjudged", "the test never called the candidate"
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


async def _wait(running: Any) -> None:
    await running


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
    job = json.loads(data)
    line = TestSide(calls, replies, job["call_seconds"])
    try:
        outcome = judge(job, line)
    except BaseException as error:
        # Memory that the program's answers took may be missing anywhere.
        outcome = "failed" if line.fault else "error", f"the checker failed: {type(error).__name__}: {str(error)[:200]}"
    write_frame(verdict, pack_json([outcome[0], outcome[1][:600]]))
    os._exit(0)
