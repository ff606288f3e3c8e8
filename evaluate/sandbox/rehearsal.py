"""Small jobs judged before the first real one, in the worker itself: both sides of the pipe, in turn.

Python adapts its code to what it runs in the first few runs. Here that happens once, in memory that all jobs share;
else each process of each job would do it again, in pages that it must copy first.
"""

import linecache
import os
import sys

from qtool.evaluate.sandbox import checker, program_side
from qtool.evaluate.sandbox.frames import write_frame
from qtool.evaluate.sandbox.in_process import judge
from qtool.evaluate.sandbox.wire import Reader, pack

_CALLS = 24  # Python 3.11 adapts code at its eighth run
_PROGRAM = """
def f(numbers, names=(), **more):
    return {"sum": [each + 1 for each in numbers], "names": sorted(names), "more": (more, 1.5, None)}
"""
_CALL = 'f([1, 2], names={"b"}, k=(0, "x"))'
_ANSWER = {"sum": [2, 3], "names": ["b"], "more": ({"k": (0, "x")}, 1.5, None)}
_TEST = f"""
def check(candidate):
    for i in range({_CALLS}):
        assert {_CALL} == {_ANSWER}
"""
_CASES = f"""
import unittest
class TestCases(unittest.TestCase):
    def test_call(self):
        self.assertEqual({_CALL}, {_ANSWER})
"""


def run(in_process: bool = False) -> None:
    """Judge them, also in one process if asked for. Raises RuntimeError where a right program does not pass: such a
    worker could judge nothing."""
    calls_in, calls_out = os.pipe()
    replies_in, replies_out = os.pipe()
    asked = {"test": _TEST, "entry_point": "f", "setup": ""}
    try:
        # The test's side reads answers that lie there already; what it asked is then answered by the program's side.
        for word in ("alive", "ready"):
            write_frame(replies_out, program_side.line_word(word))
        for _ in range(_CALLS):
            write_frame(replies_out, pack(("is", _ANSWER, {})))
        outcomes = [checker.judge(asked, checker.TestSide(calls_out, replies_in))]
        side = program_side.ProgramSide(calls_in, replies_out)
        side.load({"run": "call", "program": _PROGRAM, "entry_point": "f"})
        for _ in range(_CALLS):
            reader = Reader(side)
            side.answer(side.receive(reader), reader)
        if in_process:
            outcomes += [judge(_PROGRAM, {"test": _CASES, "entry_point": "f"}) for _ in range(_CALLS // 2)]
    finally:
        for fd in (calls_in, calls_out, replies_in, replies_out):
            os.close(fd)
    if set(outcomes) != {("passed", "")}:
        raise RuntimeError(f"a rehearsal ended with {outcomes[0]}, {outcomes[-1]}")
    for name in ("candidate", "__test__"):
        sys.modules.pop(name, None)
    linecache.clearcache()
