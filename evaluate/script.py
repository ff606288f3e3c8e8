"""A whole program as a function from its standard input to what it prints. Runs in the candidate's process."""

import contextlib
import fcntl
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Literal, TextIO


def as_function(program: str) -> Callable[[str], str]:
    """``program`` run once for each call, as ``__main__``, on real descriptors 0 and 1; exiting ends the call.

    The folder it is called in must be writable. Raises SyntaxError and ValueError as ``compile`` does.
    """
    code = compile(program, "candidate.py", "exec")

    def run(given: str) -> str:
        if not isinstance(given, str):
            raise TypeError("the input of a program is text")
        out = _file("stdout", 1)
        source = _file("stdin", 0)
        _write(source, given.encode("utf-8", "surrogateescape"))
        os.lseek(source, 0, os.SEEK_SET)
        streams = _text(0, "r"), _text(1, "w")
        sys.stdin, sys.stdout = streams
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        try:
            with contextlib.suppress(SystemExit):
                exec(code, module.__dict__)
            # Contest programs run in a thread of their own for its larger stack.
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
        finally:
            with contextlib.suppress(OSError, ValueError):
                streams[1].flush()
        size = os.fstat(out).st_size
        printed = os.pread(out, size, 0).decode("utf-8", "replace")
        os.close(out)
        os.close(source)
        return printed

    return run


def _file(name: str, descriptor: int) -> int:
    """A new, nameless file, which ``descriptor`` then means too."""
    made = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.unlink(name)
    # A program that closed its input leaves that number free: the file must not take it.
    fd = fcntl.fcntl(made, fcntl.F_DUPFD, 10)
    os.close(made)
    os.dup2(fd, descriptor)
    return fd


def _text(descriptor: int, mode: Literal["r", "w"]) -> TextIO:
    return open(descriptor, mode, encoding="utf-8", errors="surrogateescape", closefd=False)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
