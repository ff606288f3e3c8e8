"""The process that runs the model's program: nothing it says is believed, its return values are compared.

It holds two pipe ends and no secret: it was forked before the job was read, so the tests were never in its
memory.
"""

import os
import sys
import types
from typing import Any

from qtool.evaluate import script
from qtool.evaluate.wire import MAX_JOB, NotPlain, pack, read_frame, unpack, write_frame

_MUTABLE = (list, dict, set, bytearray)


def serve(calls: int, replies: int) -> None:
    """Load the program in the first frame of ``calls``, say ready, then answer calls until the pipe closes.

    Frames in: ``{program, entry_point, run}``, then ``[args, kwargs]`` each. Frames out: ``{ready: True}`` or
    ``{raised}`` once, then ``{value, changed}``, ``{raised: [builtin type name, message]}`` or ``{refused:
    why}`` for each call.
    """
    write_frame(replies, pack({"alive": True}))
    data = read_frame(calls, MAX_JOB)
    if data is None:
        return
    job = unpack(data)
    try:
        if job["run"] == "stdin":
            function: Any = script.as_function(job["program"])
        else:
            function = _load(job["program"], job["entry_point"])
        reply: dict[str, Any] = {"ready": True}
    except BaseException as error:
        reply = {"raised": _describe(error)}
    write_frame(replies, pack(reply))
    while "ready" in reply and (data := read_frame(calls)) is not None:
        args, kwargs = unpack(data)
        write_frame(replies, _answer(function, args, kwargs))


def _load(program: str, entry_point: str) -> Any:
    # A real module: dataclasses and typing look theirs up in sys.modules.
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    exec(compile(program, "candidate.py", "exec"), module.__dict__)
    function = module.__dict__.get(entry_point)
    if function is None and isinstance(solution := module.__dict__.get("Solution"), type):
        # Contest sites ask for a method of a class of that name.
        function = getattr(solution(), entry_point, None)
    if not callable(function):
        raise NameError(f"the program does not define {entry_point}")
    return function


def _answer(function: Any, args: list[Any], kwargs: dict[str, Any]) -> bytes:
    before = [pack(arg) if isinstance(arg, _MUTABLE) else b"" for arg in args]
    try:
        value = function(*args, **kwargs)
    except BaseException as error:
        return pack({"raised": _describe(error)})
    try:
        # Arguments changed in place go back too: some asserts look at them.
        changed = {i: args[i] for i, old in enumerate(before) if old and pack(args[i]) != old}
        return pack({"value": value, "changed": changed})
    except NotPlain as error:
        return pack({"refused": str(error)})
    except BaseException as error:
        return pack({"refused": f"a value that raises {type(error).__name__} when read"})


def _describe(error: BaseException) -> list[str]:
    """[name of the nearest builtin exception type, "Type: message"], bounded."""
    builtin = next((kind for kind in type(error).__mro__ if kind.__module__ == "builtins"), Exception)
    try:
        message = str(error)[:300]
    except BaseException:
        message = "?"
    return [builtin.__name__, f"{type(error).__name__}: {message}"]


def main(calls: int, replies: int) -> None:
    """``serve``, then leave without running what the program registered for exit."""
    try:
        serve(calls, replies)
    except BaseException:
        os._exit(1)
    os._exit(0)
