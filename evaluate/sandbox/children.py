"""The life of a job's processes: a fresh child becomes a locked room of its own, and in the end nobody is left."""

import contextlib
import fcntl
import os
import signal
import time
from pathlib import Path

from qtool.evaluate.sandbox import isolation
from qtool.evaluate.sandbox.cell import Cell, Language

# Above every descriptor a worker ever has open.
_PARKED = 128
# V8's heap; what lies outside it (buffers) is bounded by the process's limits.
_NODE_OPTIONS = ("--max-old-space-size=512", "--no-warnings")
# The system's file, if it may not be read, ends node at once; one that is missing does not.
_NODE_ENVIRONMENT = {"OPENSSL_CONF": "/missing"}


def become(cell: Cell, kept: list[int], writable: str | None, seconds: float, language: Language, role: str) -> None:
    """In a fresh child: null standard streams, ``kept`` as descriptors 3, 4, ..., nothing else, no rights.

    A JavaScript job's process then becomes node, in ``role``, and does not return.
    """
    try:
        os.setsid()
        parked = [fcntl.fcntl(fd, fcntl.F_DUPFD, _PARKED) for fd in kept]
        for target in (0, 1, 2):
            os.dup2(cell.null, target)
        for target, fd in enumerate(parked, start=3):
            os.dup2(fd, target)
        os.closerange(3 + len(kept), _PARKED + len(kept) + 1)
        os.chdir(writable or "/")
        cell.lock_down(writable, seconds, language)
        if language == "javascript" and cell.kit.node is not None:
            os.execve(cell.kit.node, ["node", *_NODE_OPTIONS, "-e", cell.kit.script, role], _NODE_ENVIRONMENT)
    except BaseException:
        os._exit(1)


def make_writable(cell: Cell) -> str:
    """A new folder for the candidate's files; with namespaces, also its PID namespace."""
    if cell.tier == "namespaces":
        isolation.own_pid_namespace()
    folder = os.path.join("/tmp" if cell.tier == "namespaces" else cell.folder, str(os.getpid()))
    os.mkdir(folder, 0o700)
    if cell.uid is not None:
        os.chown(folder, cell.uid, cell.uid)
    return folder


def end(cell: Cell, pids: list[int]) -> None:
    """Kill the processes, their groups and, without namespaces, whatever they left behind; wait for all of them."""
    for pid in pids:
        for kill in (os.kill, os.killpg):
            with contextlib.suppress(OSError):
                kill(pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    if cell.tier == "none":
        _end_orphans()


def _end_orphans() -> None:
    # A candidate that forks faster than this loop kills still ends: orphans come here, one generation a
    # round.
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    for _ in range(200):
        listed = children.read_text().split() if children.exists() else []
        for child in listed:
            with contextlib.suppress(OSError):
                os.kill(int(child), signal.SIGKILL)
        reap()
        if not listed:
            return
        time.sleep(0.005)


def reap() -> None:
    """Take the exit status of every child that has ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
