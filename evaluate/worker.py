"""The child program that holds the sandbox: a zygote that forks three processes for every job.

    zygote (namespaces set up, modules imported, has read no job)
      └─ supervisor      reads the job, keeps the time, reports the outcome
           ├─ checker    has the test and the verdict pipe
           └─ candidate  has the program; forked BEFORE the job is read, PID 1 of its own namespace

The standard input carries jobs: the byte ``J``, then two frames (the candidate's, the checker's). The
standard output carries frames: one greeting ``{sandbox}`` or ``{missing}``, then ``[outcome, detail]`` for
each job.
"""

import contextlib
import fcntl
import gc
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

from qtool.evaluate import candidate, checker, isolation, seccomp
from qtool.evaluate.wire import NotPlain, pack, read_frame, unpack, write_frame

THREADS = 64
# Above every descriptor a worker ever has open.
_PARKED = 128
# Imported once here, so that a job does not spend its time on them.
_PRELOADED = (
    "abc array ast bisect cmath collections contextlib copy dataclasses datetime decimal enum fractions "
    "functools hashlib heapq inspect io itertools json math operator random re statistics string textwrap "
    "types typing unicodedata"
)


class Cell:
    """What all jobs of this worker share: tier, time limit, user to become, folder for candidates' files."""

    def __init__(self, tier: str, folder: str, uid: int, timeout: float, null: int) -> None:
        self.tier = tier
        self.timeout = timeout
        self.folder = folder
        self.null = null
        self.uid: int | None = None
        self.use_landlock = tier != "none" and isolation.landlock_version() > 0
        self.use_seccomp = tier != "none" and seccomp.available()
        if tier != "none" and not self.use_seccomp:
            raise OSError(0, f"no system-call filter for {os.uname().machine}")
        if tier == "landlock" and not self.use_landlock:
            raise OSError(0, "Landlock is not in this kernel")
        if tier != "none" and os.geteuid() == 0 and _can_work_as(uid):
            self.uid = uid

    def describe(self) -> str:
        """The measures in force, for the scorecard."""
        if self.tier == "none":
            return "none (resource limits only)"
        parts = ["namespaces (mount, pid, net, ipc, uts)"] if self.tier == "namespaces" else []
        if self.use_landlock:
            parts.append(f"landlock v{isolation.landlock_version()}")
        parts.append("seccomp")
        parts.append("resource limits")
        if self.uid is not None:
            parts.append("unprivileged user")
        return " + ".join(parts)

    def lock_down(self, writable: str | None) -> None:
        """Give up, in the calling process and for good, all that a job must not have."""
        isolation.limit_resources(self.timeout, THREADS if self.uid is not None else None)
        if self.tier == "none":
            isolation.die_with_parent()
            return
        isolation.drop_privileges(self.uid)
        isolation.die_with_parent()
        isolation.hide()
        if self.use_landlock:
            readable = [Path("/")] if self.tier == "namespaces" else isolation.standard_library()
            isolation.landlock(readable, [Path(writable)] if writable else [])
        if self.use_seccomp:
            isolation.forbid_calls()


def _can_work_as(uid: int) -> bool:
    """Whether a process of that user can read the standard library (an interpreter below /root cannot)."""
    pid = os.fork()
    if pid == 0:
        try:
            isolation.drop_privileges(uid)
            with open(os.__file__, "rb") as file:
                file.read(1)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def main(tier: str, folder: str, uid: int, timeout: float) -> None:
    """Serve jobs until the standard input ends. ``folder`` is an empty folder of this worker's own."""
    for name in _PRELOADED.split():
        __import__(name)
    os.environ.clear()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    isolation.die_with_parent()
    # Opened while there is a /dev.
    null = os.open(os.devnull, os.O_RDWR)
    if tier == "namespaces":
        try:
            isolation.enter_namespaces(folder)
        except OSError as error:
            write_frame(1, pack({"missing": str(error)}))
            os._exit(1)
        # Only children are in the new PID namespace: the first of them, PID 1, is the zygote.
        pid = os.fork()
        if pid:
            os.close(0)
            os.close(1)
            os._exit(1 if os.waitpid(pid, 0)[1] else 0)
        isolation.die_with_parent()
        os.dup2(null, 2)
    try:
        cell = Cell(tier, folder, uid, timeout, null)
    except OSError as error:
        write_frame(1, pack({"missing": str(error)}))
        os._exit(1)
    write_frame(1, pack({"sandbox": cell.describe()}))
    # Pages shared with children stay shared: the collector leaves what exists now alone.
    gc.collect()
    gc.freeze()
    _serve(cell)


def _serve(cell: Cell) -> None:
    while os.read(0, 1):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _supervise(cell)
                code = 0
            finally:
                os._exit(code)
        if os.waitpid(pid, 0)[1] != 0:
            # Part of the job may be unread: the stream is lost, the host starts a new worker.
            os._exit(1)
        _reap()
    os._exit(0)


def _supervise(cell: Cell) -> None:
    """One job, whole. The order matters: both children exist before the first byte of the job is read."""
    if cell.tier == "none":
        isolation.adopt_orphans()
    isolation.die_with_parent()
    isolation.hide()
    test_in, test_out = os.pipe()
    calls_in, calls_out = os.pipe()
    replies_in, replies_out = os.pipe()
    verdict_in, verdict_out = os.pipe()
    judge = os.fork()
    if judge == 0:
        _become(cell, [test_in, calls_out, replies_in, verdict_out], None)
        checker.main(3, 4, 5, 6)
    writable = _writable(cell)
    answerer = os.fork()
    if answerer == 0:
        _become(cell, [calls_in, replies_out], writable)
        candidate.main(3, 4)
    for fd in (test_in, calls_in, replies_in, replies_out, verdict_out):
        os.close(fd)
    outcome = _follow(cell.timeout, test_out, calls_out, verdict_in)
    _end(cell, answerer)
    _end(cell, judge)
    _remove(writable)
    write_frame(1, pack(list(outcome)))


def _follow(timeout: float, test: int, calls: int, verdict: int) -> tuple[str, str]:
    """Hand the job to the children and wait for the checker's word until the time is up."""
    program, question = read_frame(0), read_frame(0)
    if program is None or question is None:
        os._exit(1)
    deadline = time.monotonic() + timeout
    try:
        # The program goes first through the pipe that carries the calls later.
        write_frame(calls, program)
        os.close(calls)
        write_frame(test, question)
        os.close(test)
    except OSError as error:
        return "error", f"the job could not be handed over: {error.strerror}"
    if not select.select([verdict], [], [], max(0.0, deadline - time.monotonic()))[0]:
        return "timeout", f"no verdict after {timeout:g} s"
    try:
        data = read_frame(verdict, limit=4096)
    except NotPlain:
        data = None
    if data is None:
        return "error", "the checker's process ended without a verdict"
    outcome, detail = unpack(data)
    return outcome, detail


def _remove(folder: str) -> None:
    """Delete what the (ended) candidate wrote, folders it made unreadable included."""
    with contextlib.suppress(OSError):
        os.chmod(folder, 0o700)
    for parent, names, _ in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names):
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _become(cell: Cell, kept: list[int], writable: str | None) -> None:
    """In a fresh child: null standard streams, ``kept`` as descriptors 3, 4, ..., nothing else, no rights."""
    try:
        os.setsid()
        parked = [fcntl.fcntl(fd, fcntl.F_DUPFD, _PARKED) for fd in kept]
        for target in (0, 1, 2):
            os.dup2(cell.null, target)
        for target, fd in enumerate(parked, start=3):
            os.dup2(fd, target)
        os.closerange(3 + len(kept), _PARKED + len(kept) + 1)
        os.chdir(writable or "/")
        cell.lock_down(writable)
    except BaseException:
        os._exit(1)


def _writable(cell: Cell) -> str:
    """A new folder for the candidate's files; with namespaces, also its PID namespace."""
    if cell.tier == "namespaces":
        isolation.own_pid_namespace()
    folder = os.path.join("/tmp" if cell.tier == "namespaces" else cell.folder, str(os.getpid()))
    os.mkdir(folder, 0o700)
    if cell.uid is not None:
        os.chown(folder, cell.uid, cell.uid)
    return folder


def _end(cell: Cell, pid: int) -> None:
    """Kill the process, its group and, without namespaces, whatever it left behind; wait for all of them."""
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        return
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
        _reap()
        if not listed:
            return
        time.sleep(0.005)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
