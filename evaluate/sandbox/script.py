"""A whole program as a function from its standard input to what it prints. Runs in the candidate's process."""

import atexit
import builtins
import contextlib
import fcntl
import gc
import io
import linecache
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

_STREAMS = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2, "/dev/fd/0": 0, "/dev/fd/1": 1, "/proc/self/fd/0": 0}
_NAME = "candidate.py"


class _Ended(BaseException):
    """The program ended its process by `os._exit`."""


def as_function(program: str) -> Callable[[str], str]:
    """``program`` run once for each call, as ``__main__``, on real descriptors 0 and 1; exiting ends the call.

    The folder it is called in must be writable. Raises SyntaxError and ValueError as ``compile`` does.
    """
    code = compile(program, _NAME, "exec")
    _leave_by_exception()
    _open_streams_by_name()
    own = dict(vars(builtins))

    def run(given: str) -> str:
        if not isinstance(given, str):
            raise TypeError("the input of a program is text")
        out = _file("stdout", 1)
        source = _file("stdin", 0)
        _write(source, given.encode("utf-8", "surrogateescape"))
        os.lseek(source, 0, os.SEEK_SET)
        # An earlier call's `builtins.input = ...` is not this one's.
        vars(builtins).update(own)
        for name in set(vars(builtins)) - set(own):
            delattr(builtins, name)
        entry = io.FileIO(0, closefd=False)
        entry.name = "<stdin>"
        reader = io.TextIOWrapper(io.BufferedReader(entry), "utf-8", "surrogateescape")
        reader.mode = "r"  # type: ignore[misc]  # plain Python's own has it, too
        sys.stdin = sys.__stdin__ = reader  # type: ignore[misc]  # final for typing alone
        raw = io.FileIO(1, "w", closefd=False)
        raw.name = "<stdout>"
        printer = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="surrogateescape")
        printer.mode = "w"  # type: ignore[misc]  # as the reader's
        sys.stdout = sys.__stdout__ = printer  # type: ignore[misc]  # as stdin
        module = types.ModuleType("__main__")
        module.__file__ = os.path.join(os.getcwd(), _NAME)
        vars(module)["__builtins__"] = builtins
        for name in (_NAME, module.__file__):
            linecache.cache[name] = (len(program), None, program.splitlines(True), name)
        sys.modules["__main__"] = module
        sys.argv[:] = [_NAME]
        try:
            if _run(code, module.__dict__):
                _flush(sys.stdout, printer)
                vars(module).clear()
                gc.collect()  # what is printed by a `__del__` at the end
                _flush(printer)
        except BaseException:
            _flush(sys.stdout, printer)
            raise
        finally:
            # What is left in a buffer must not come out in a later call, and no file that it opened be closed there.
            raw.close()
            vars(module).clear()
            gc.collect()
        size = os.fstat(out).st_size
        printed = os.pread(out, size, 0).decode("utf-8", "replace")
        os.close(out)
        os.close(source)
        return printed

    return run


def _flush(*streams: Any) -> None:
    for stream in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _run(code: types.CodeType, space: dict[str, Any]) -> bool:
    """The program, its threads, and what it registered for its end, as the interpreter runs them. False if it ended its
    process: then nothing is flushed."""
    try:
        with contextlib.suppress(SystemExit):
            exec(code, space)
        _end_pools()
        # Contest programs run in a thread of their own for its larger stack.
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except _Ended:
        atexit._clear()
        return False
    with contextlib.suppress(SystemExit, _Ended):
        atexit._run_exitfuncs()
    ended: Any = weakref.finalize
    ended._registered_with_atexit = ended._shutdown = False
    return True


def _end_pools() -> None:
    """Let the threads of executors end that nobody shut down, as the interpreter does before it joins them."""
    pools = sys.modules.get("concurrent.futures.thread")
    if pools is not None:
        pools._python_exit()
        vars(pools)["_shutdown"] = False


def _leave_by_exception() -> None:
    """`os._exit` ends the call, not the process that has further inputs to answer. What was not flushed is lost, as it
    would be."""

    def leave(status: int) -> None:
        raise _Ended

    os._exit = leave  # type: ignore[assignment]  # which never returns either, but raises


def _open_streams_by_name() -> None:
    """`open("/dev/stdin")` is the program's input, though the sandbox shows no such file."""
    really = io.open

    def opened(file: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, str) and file in _STREAMS:
            file = os.dup(_STREAMS[file])
        elif type(file) is int and file in (0, 1, 2) and kwargs.get("closefd", True):
            # A file of an earlier call, closed when it is collected, must not close the number for this one.
            file = os.dup(file)
        return really(file, *args, **kwargs)

    io.open = opened
    builtins.open = opened


def _file(name: str, descriptor: int) -> int:
    """A new, nameless file, which ``descriptor`` then means too."""
    made = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.unlink(name)
    # A program that closed its input leaves that number free: the file must not take it.
    fd = fcntl.fcntl(made, fcntl.F_DUPFD, 10)
    os.close(made)
    os.dup2(fd, descriptor)
    return fd


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
