"""The host's end of one worker: a job goes in, an outcome comes out, and no process is left behind."""

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

from qtool.convert.files.durable import work_folder
from qtool.evaluate.sandbox import scratch
from qtool.evaluate.sandbox.cell import Kit, Language, shown_paths
from qtool.evaluate.sandbox.frames import MAX_ANSWER, MAX_JOB, NotPlain, pack_json, read_frame, unpack_json
from qtool.evaluate.sandbox.worker import MODES

OutcomeName = Literal["passed", "failed", "timeout", "error", "unjudged"]

# Two hollow packages stand for the real ones, whose root imports click.
_BOOT = """
import sys, types
for name in ("qtool", "qtool.evaluate", "qtool.evaluate.sandbox"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1]]
from qtool.evaluate.sandbox.worker import main
main(sys.argv[2])
"""
START_SECONDS = 30.0
_GRACE_SECONDS = 10.0
# User ids that candidates of a root user's run take; 65536 ids are what containers usually map.
_FIRST_UID, _UIDS = 60_000, 5_000
_worker_numbers = itertools.count(os.getpid())


@dataclass(frozen=True)
class Job:
    """One program to judge. ``test`` defines ``check(candidate)`` or holds bare asserts on ``entry_point``.

    ``setup`` is trusted code that the test may use (the problem's prompt with its helper functions); it runs
    in the checker, never in the candidate. ``run``: "call", "stdin" (the test calls the whole program with its input
    and gets what it printed), or "in_process" (program and test share a process, and the program could cheat).
    ``libraries``: modules beyond the standard library that it may import. ``seconds``: a time limit of its own, where
    that is longer than the run's; ``call_seconds``: the limit of one call.
    """

    task_id: str
    program: str
    test: str
    entry_point: str
    setup: str = ""
    run: Literal["call", "stdin", "in_process"] = "call"
    language: Language = "python"
    libraries: tuple[str, ...] = ()
    seconds: float | None = None
    call_seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What the checker found. Two names say nothing about the program: "error" (the sandbox failed) and "unjudged" (the
    test cannot run here)."""

    task_id: str
    outcome: OutcomeName
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


class WorkerLost(Exception):
    """The worker could not start, or stopped answering."""


class Worker:
    """One child program that judges one job at a time; a context manager that leaves no process behind."""

    def __init__(self, tier: str, timeout: float, kit: Kit | None = None) -> None:
        self._timeout = timeout
        self._kit = kit or Kit()
        self._folder, self._hold = work_folder("qtool-cell-", scratch.remove)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the worker: `close` closes it
        try:
            os.chmod(self._folder, 0o711)
            self._process = subprocess.Popen(
                self._command(tier),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={"PYTHONHASHSEED": "0", "LD_BIND_NOW": "1"},
                cwd="/",
                bufsize=0,
                start_new_session=True,
            )
        except BaseException as error:
            self._clean()
            if isinstance(error, OSError):
                raise WorkerLost(f"the worker cannot start ({error})") from error
            raise
        try:
            greeting = self._answer(START_SECONDS)
            if not isinstance(greeting, dict) or "sandbox" not in greeting:
                missing = greeting.get("missing") if isinstance(greeting, dict) else None
                raise WorkerLost(str(missing or "the worker does not answer"))
        except BaseException:
            self.close()
            raise
        self.description: str = ("bubblewrap + " if tier == "bubblewrap" else "") + greeting["sandbox"]

    def _command(self, tier: str) -> list[str]:
        # Not -I but its parts without -E: the hash seed makes the order of sets the same in every run.
        python = [sys.executable, "-s", "-P", "-S", "-B", "-c", _BOOT, str(Path(__file__).parent)]
        config = {
            "tier": "landlock" if tier == "bubblewrap" else tier,
            "uid": _FIRST_UID + next(_worker_numbers) % _UIDS,
            "folder": self._folder,
            "kit": asdict(self._kit),
        }
        around = _bubblewrap(self._folder, self._kit) if tier == "bubblewrap" else []
        return [*around, *python, json.dumps(config)]

    def judge(self, job: Job) -> Outcome:
        """The outcome of one job, after at most the time limit and some grace. Raises WorkerLost."""
        seconds = max(self._timeout, job.seconds or 0.0)
        program = pack_json({"program": job.program, "entry_point": job.entry_point, "run": job.run}, MAX_JOB)
        test = {"test": job.test, "entry_point": job.entry_point, "setup": job.setup, "call_seconds": job.call_seconds}
        mode = MODES["in_process" if job.run == "in_process" else "javascript" if job.language != "python" else "call"]
        data = mode + round(seconds * 1000).to_bytes(4, "big")
        data += b"".join(len(part).to_bytes(4, "big") + part for part in (program, pack_json(test, MAX_JOB)))
        deadline = time.monotonic() + seconds + _GRACE_SECONDS
        self._send(data, deadline)
        answer = self._answer(deadline - time.monotonic())
        if not (isinstance(answer, list) and len(answer) == 2):
            raise WorkerLost("the worker answered nonsense")
        # The detail quotes the candidate: no escape sequence reaches a terminal, no surrogate a file.
        detail = "".join(letter if letter.isprintable() else " " for letter in answer[1])
        return Outcome(job.task_id, answer[0], detail)

    def _send(self, data: bytes, deadline: float) -> None:
        assert self._process.stdin is not None
        fd = self._process.stdin.fileno()
        os.set_blocking(fd, False)
        view = memoryview(data)
        while view:
            if not _ready(fd, select.POLLOUT, deadline - time.monotonic()):
                raise WorkerLost("the worker does not read")
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise WorkerLost(f"the worker ended ({error.strerror})") from error

    def _answer(self, seconds: float) -> object:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        if not _ready(fd, select.POLLIN, seconds):
            raise WorkerLost("the worker does not answer")
        try:
            data = read_frame(fd, MAX_ANSWER)
            answer: object = None if data is None else unpack_json(data)
        except NotPlain as error:
            raise WorkerLost(f"the worker answered {error}") from error
        if data is None:
            self._errors.seek(0)
            last = self._errors.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
            raise WorkerLost("the worker ended" + (f" ({last[-1][:300]})" if last else ""))
        return answer

    def kill(self) -> None:
        """End what it is doing: whoever waits for its answer in `judge` gets WorkerLost. It is still to be closed."""
        self._process.kill()

    def close(self) -> None:
        """End the worker and all in it: closing its input ends it, the kill is for one that is stuck."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._clean()

    def _clean(self) -> None:
        self._errors.close()
        with contextlib.suppress(OSError):
            scratch.remove(self._folder)
        os.close(self._hold)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _ready(fd: int, event: int, seconds: float) -> bool:
    """Whether a read or write goes on before the time is up. A host may have more descriptors than select takes."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def _bubblewrap(folder: str, kit: Kit) -> list[str]:
    """bwrap's command line for a worker. Raises WorkerLost where it is not installed."""
    program = shutil.which("bwrap")
    if program is None:
        raise WorkerLost("bwrap is not installed")
    shown = [Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parent, Path(__file__).parent]
    shown += [*shown_paths(kit), Path("/usr"), Path("/lib"), Path("/lib64"), Path("/bin"), Path("/etc/ld.so.cache")]
    binds = itertools.chain.from_iterable(("--ro-bind", str(path), str(path)) for path in shown if path.exists())
    options = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    return [program, *options, "--dev", "/dev", "--tmpfs", "/tmp", *binds, "--bind", folder, folder]
