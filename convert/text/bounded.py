"""A stranger's template or tokenizer at work: in a child process, with a limit of time and of memory.

Jinja's sandbox keeps a template from the machine, but not from looping; a tokenizer's normalizer may turn a letter into
a megabyte. Nothing inside this process can stop either, so it happens in a fork of it: no import is paid again, and
what the work needs is there. The fork touches neither torch nor the terminal, and answers in lines of JSON. Nor does it
open a pipe or a device, whichever library asks: a stranger's folder has them under the names of files.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.reading import other_kind, shown

SECONDS = 5.0  # templates and probes take milliseconds
MEMORY = 2**30
ANSWER = 2**28
IDLE = 20.0  # seconds of a clock in which the child neither computed nor waited for its turn on a busy machine
LONGEST = 600.0  # seconds of a clock in all
_PARALLEL = "TOKENIZERS_PARALLELISM"


class Overrun(Exception):
    """The work broke a limit or died. ``reason`` continues the sentence "it …"; ``done``: the values that came
    before."""

    def __init__(self, reason: str, done: list[Any]) -> None:
        super().__init__(reason)
        self.reason = reason
        self.done = done


def bounded(
    work: Callable[[], Iterable[Any]], seconds: float = SECONDS, memory: int = MEMORY, answer: int = ANSWER
) -> list[Any]:
    """The values of ``work`` (whatever JSON can say), made with at most ``seconds`` of processor time and ``memory``
    bytes beyond what this process has, said in ``answer`` bytes. Raises Overrun.

    Where a system cannot fork, the work is done here."""
    if not hasattr(os, "fork"):
        return list(work())
    reader, writer = os.pipe()
    child = _fork()
    if child == 0:
        _child(work, writer, seconds, memory)
    os.close(writer)
    data, reason = b"", "was interrupted"
    try:
        data, reason = _read(reader, child, answer)
    finally:
        os.close(reader)
        if reason:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    values = [json.loads(line) for line in data.split(b"\n")[:-1]]
    fault = values.pop()["fault"] if values and isinstance(values[-1], dict) and "fault" in values[-1] else ""
    values = [value[0] for value in values]
    if fault or reason or status:
        raise Overrun(fault or reason or _death(status, seconds, memory), values)
    return values


def _fork() -> int:
    """A fork of which neither tokenizers nor Python warns: the work needs none of the threads that it lacks."""
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "false"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return os.fork()
    finally:
        if before is None:
            os.environ.pop(_PARALLEL, None)
        else:
            os.environ[_PARALLEL] = before


def _child(work: Callable[[], Iterable[Any]], writer: int, seconds: float, memory: int) -> None:
    code = 1
    try:
        os.environ[_PARALLEL] = "false"
        faulthandler.disable()  # it would tell a terminal where the child died
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        sys.addaudithook(_files_alone)
        _limit(seconds, memory)
        with os.fdopen(writer, "wb") as out:
            try:
                for value in work():
                    out.write(json.dumps([value]).encode() + b"\n")
                    out.flush()
            except MemoryError:
                out.write(json.dumps({"fault": _too_much(memory)}).encode() + b"\n")
            except BaseException as error:  # a panic of Rust is no Exception
                said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                out.write(json.dumps({"fault": f"ended in {said}"}).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)


def _files_alone(event: str, arguments: tuple[Any, ...]) -> None:
    """Raises QtoolError before a path is opened that is neither a file nor a folder: a pipe would wait for ever."""
    if event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    path: Any = arguments[0]
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # opening it says so
        return
    if not stat.S_ISDIR(mode) and (kind := other_kind(mode)):
        raise QtoolError(f"{shown(os.fsdecode(path))}: is {kind}, not a file.")


def _limit(seconds: float, memory: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    bounds = [(resource.RLIMIT_CPU, int(seconds) + 1)]
    with contextlib.suppress(OSError):  # not Linux: no limit of memory there
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        bounds.append((resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + memory))
    for which, value in bounds:
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, hard))


def _read(reader: int, child: int, most: int) -> tuple[bytes, str]:
    """Everything the child says, and why no more of it is waited for.

    The kernel ends a child that computes too long. The clock alone decides nothing: on a busy machine a child waits for
    its turn, and only one that does not even want a turn hangs.
    """
    data = bytearray()
    end, idle, before = time.monotonic() + LONGEST, 0.0, 0
    while time.monotonic() < end:
        if not select.select([reader], [], [], 1.0)[0]:
            waiting, used = _state(child)
            idle = idle + 1.0 if waiting and used == before else 0.0
            before = used
            if idle >= IDLE:
                return bytes(data), f"hangs: {IDLE:.0f} s without a sign of life"
            continue
        piece = os.read(reader, 2**20)
        if not piece:
            return bytes(data), ""
        data += piece
        if len(data) > most:
            return bytes(data), f"makes more than {most // 2**20} MiB of text"
    return bytes(data), f"takes more than {LONGEST:.0f} s"


def _state(child: int) -> tuple[bool, int]:
    """Whether a process sleeps, and the clock ticks of processor time it has had (Linux; elsewhere: it sleeps)."""
    try:
        fields = Path(f"/proc/{child}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
        return fields[0] in "SD", int(fields[11]) + int(fields[12])
    except (OSError, IndexError, ValueError):
        return True, 0


def _death(status: int, seconds: float, memory: int) -> str:
    if status == -signal.SIGXCPU:
        return f"takes more than {seconds:.0f} s of processor time"
    if status == -signal.SIGABRT:  # how a library in Rust ends where memory is refused
        return _too_much(memory)
    return f"ended the process it ran in (status {status})"


def _too_much(memory: int) -> str:
    return f"takes more than {memory // 2**20} MiB of memory"
