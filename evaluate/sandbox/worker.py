"""The child program that holds the sandbox: a zygote that forks three processes for every job.

    zygote (namespaces set up, modules imported, has read no job)
      └─ supervisor      reads the job, keeps the time, reports the outcome
           ├─ checker    has the test and the verdict pipe
           └─ candidate  has the program; forked BEFORE the job is read, PID 1 of its own namespace

The standard input carries jobs: one byte that says how it is judged (see MODES), the time limit in milliseconds (4
bytes), then two frames (the candidate's, the checker's). The standard output carries frames: one greeting ``{sandbox}``
or ``{missing}``, then ``[outcome, detail]`` for each job. A job judged in process has no checker: what would be its
candidate gets the test too.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

from qtool.evaluate.sandbox import checker, in_process, isolation, program_side, rehearsal, scratch
from qtool.evaluate.sandbox.cell import Cell, Kit, Language, hidden_paths, shown_paths
from qtool.evaluate.sandbox.frames import (
    MAX_ANSWER,
    MAX_JOB,
    NotPlain,
    pack_json,
    read_frame,
    unpack_json,
    write_frame,
)
from qtool.evaluate.sandbox.in_process import LOADING

# The byte before each job: Python called over a pipe, JavaScript so, Python in one process with its test.
MODES = {"call": b"J", "javascript": b"N", "in_process": b"P"}
_SAID = ("alive", "passed", "failed", "timeout", "error", "unjudged")
# Above every descriptor a worker ever has open.
_PARKED = 128
# What a program may put on the disk, in all; how often that is looked at.
_MOST_BYTES, _MOST_FILES, _LOOK_SECONDS = 64 * 2**20, 4096, 0.01
# Imported once here, so that a job does not spend its time on them.
_PRELOADED = (
    "abc array ast bisect cmath collections contextlib copy dataclasses datetime decimal enum fractions "
    "functools hashlib heapq inspect io itertools json math operator random re statistics string textwrap "
    "threading types typing unicodedata"
)
# V8's heap; what lies outside it (buffers) is bounded by the process's limits.
_NODE_OPTIONS = ("--max-old-space-size=512", "--no-warnings")
# The system's file, if it may not be read, ends node at once; one that is missing does not.
_NODE_ENVIRONMENT = {"OPENSSL_CONF": "/missing"}


def main(config: str) -> None:
    """Serve jobs until the standard input ends. ``config`` is JSON: ``tier``, ``uid``, ``folder`` (an empty folder of
    this worker's own), ``kit`` (the fields of a Kit)."""
    known = json.loads(config)
    tier, folder = known["tier"], known["folder"]
    kit = Kit(**known["kit"])
    for name in (*_PRELOADED.split(), *(["unittest"] if kit.unittest else [])):
        __import__(name)
    _import_libraries(kit, folder)
    os.environ.clear()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    isolation.die_with_parent()
    # Opened while there is a /dev.
    null = os.open(os.devnull, os.O_RDWR)
    if tier == "namespaces":
        try:
            isolation.enter_namespaces(folder, shown_paths(kit), hidden_paths(kit))
        except OSError as error:
            write_frame(1, pack_json({"missing": str(error)}))
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
        cell = Cell(tier, folder, known["uid"], kit, null)
    except OSError as error:
        write_frame(1, pack_json({"missing": str(error)}))
        os._exit(1)
    write_frame(1, pack_json({"sandbox": cell.describe()}))
    rehearsal.run(in_process=kit.unittest)
    # Pages shared with children stay shared: the collector leaves what exists now alone.
    gc.collect()
    gc.freeze()
    _serve(cell)


def _import_libraries(kit: Kit, folder: str) -> None:
    """Once for all jobs. One thread each: jobs already run on every core."""
    if not kit.libraries:
        return
    sys.path += kit.folders
    os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
    os.environ.update({"MPLCONFIGDIR": folder, "HOME": folder, "MPLBACKEND": "Agg"})
    for name in kit.libraries:
        # One that cannot be imported fails again in the job that imports it, and is named there.
        with contextlib.suppress(BaseException):
            importlib.import_module(name)
    for entry in os.scandir(folder):
        shutil.rmtree(entry.path, ignore_errors=True) if entry.is_dir() else os.unlink(entry.path)


def _serve(cell: Cell) -> None:
    while mode := os.read(0, 1):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _supervise(cell, mode)
                code = 0
            finally:
                os._exit(code)
        if os.waitpid(pid, 0)[1] != 0:
            # Part of the job may be unread: the stream is lost, the host starts a new worker.
            os._exit(1)
        _reap()
    os._exit(0)


def _supervise(cell: Cell, mode: bytes) -> None:
    """One job, whole. The order matters: all children exist before the first byte of the program is read."""
    seconds = int.from_bytes(_exactly(4), "big") / 1000
    if cell.tier == "none":
        isolation.adopt_orphans()
    isolation.die_with_parent()
    isolation.hide()
    language: Language = "javascript" if mode == MODES["javascript"] else "python"
    alone = mode == MODES["in_process"]
    nonce = os.urandom(8).hex() if alone else ""
    test_in, test_out = os.pipe()
    calls_in, calls_out = os.pipe()
    replies_in, replies_out = os.pipe()
    verdict_in, verdict_out = os.pipe()
    judge = 0
    if not alone:
        judge = os.fork()
        if judge == 0:
            _become(cell, [test_in, calls_out, replies_in, verdict_out], None, seconds, language, "checker")
            checker.main(3, 4, 5, 6)
    writable = _writable(cell)
    answerer = os.fork()
    if answerer == 0:
        kept = [calls_in, test_in, verdict_out] if alone else [calls_in, replies_out]
        _become(cell, kept, writable, seconds, language, "candidate")
        if alone:
            in_process.main(3, 4, 5, nonce)
        program_side.main(3, 4)
    for fd in (test_in, calls_in, replies_in, replies_out, verdict_out):
        os.close(fd)
    outcome = _follow(seconds, test_out, calls_out, verdict_in, nonce, writable)
    _end(cell, [answerer, judge] if judge else [answerer])
    write_frame(1, pack_json(list(outcome)))
    scratch.remove(writable)  # what cannot be removed ends this worker, and a new one takes its place


def _exactly(size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            os._exit(1)
        data += part
    return data


def _follow(seconds: float, test: int, calls: int, verdict: int, nonce: str, folder: str) -> tuple[str, str]:
    """Hand the job to the children and wait for the verdict until the time is up."""
    program, question = read_frame(0, MAX_JOB), read_frame(0, MAX_JOB)
    if program is None or question is None:
        os._exit(1)
    deadline = time.monotonic() + seconds
    if nonce and _verdict(verdict, deadline, nonce) != ("alive", ""):
        return "error", "the program's process could not be locked down"
    try:
        # The program goes first through the pipe that carries the calls later.
        for fd, data in ((calls, program), (test, question)):
            os.set_blocking(fd, False)
            if not _write_until(fd, len(data).to_bytes(4, "big") + data, deadline):
                return "timeout", f"no verdict after {seconds:g} s"
            # The checker, which shares this end, waits where the pipe is full: a call may be larger than that.
            os.set_blocking(fd, True)
            os.close(fd)
    except OSError as error:
        kind = "failed" if nonce else "error"
        return kind, f"the job could not be handed over: {error.strerror}"
    if nonce and (told := _verdict(verdict, deadline, nonce)) is not None and told != LOADING:
        # said before the program was loaded, so by nobody but the judge
        return told if told[0] == "unjudged" else ("failed", "ended before its test was over")
    if not _in_bounds(verdict, deadline, folder):
        return "failed", f"wrote more than {_MOST_BYTES >> 20} MiB or {_MOST_FILES} files"
    found = _verdict(verdict, deadline, nonce)
    if found is None:
        return "timeout", f"no verdict after {seconds:g} s"
    if found[0] == "":
        # In one process, the program is what ended. Else the checker did, over what the program sent: it had lived to
        # take the job, and each worker has shown that it can judge.
        return "failed", "ended before its test was over" if nonce else "its test ended without a verdict"
    if nonce and found[0] != "passed":  # whatever the program may have written there
        return "failed", found[1]
    return found


def _write_until(fd: int, data: bytes, deadline: float) -> bool:
    view = memoryview(data)
    while view:
        if not select.select([], [fd], [], max(0.0, deadline - time.monotonic()))[1]:
            return False
        with contextlib.suppress(BlockingIOError):
            view = view[os.write(fd, view) :]
    return True


def _in_bounds(fd: int, deadline: float, folder: str) -> bool:
    """Wait for the verdict or the deadline; False as soon as ``folder`` holds too much. Where it is on the host's own
    disk nothing else bounds the number of files."""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([fd], [], [], min(left, _LOOK_SECONDS))[0]:
            break
        if scratch.crowded(folder, _MOST_BYTES, _MOST_FILES):
            return False
    return True


def _verdict(fd: int, deadline: float, nonce: str) -> tuple[str, str] | None:
    """(outcome, detail) from the pipe; ("", "") for the end of it or a forgery; None if the time is up."""
    if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        return None
    try:
        data = read_frame(fd, MAX_ANSWER)
        found = None if data is None else unpack_json(data)
    except NotPlain:
        found = None
    expected = 3 if nonce else 2
    if type(found) is not list or len(found) != expected or not all(type(part) is str for part in found):
        return "", ""
    if found[0] not in _SAID or (nonce and found[2] != nonce):
        return "", ""
    return found[0], found[1]


def _become(cell: Cell, kept: list[int], writable: str | None, seconds: float, language: Language, role: str) -> None:
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


def _writable(cell: Cell) -> str:
    """A new folder for the candidate's files; with namespaces, also its PID namespace."""
    if cell.tier == "namespaces":
        isolation.own_pid_namespace()
    folder = os.path.join("/tmp" if cell.tier == "namespaces" else cell.folder, str(os.getpid()))
    os.mkdir(folder, 0o700)
    if cell.uid is not None:
        os.chown(folder, cell.uid, cell.uid)
    return folder


def _end(cell: Cell, pids: list[int]) -> None:
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
