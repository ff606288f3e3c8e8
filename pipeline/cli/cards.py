"""`qtool run --gpus N`: the command once for each card, and one line where any of them ends before its time.

Each is a process in a session of its own, told its rank as torchrun would tell it. Rank 0 speaks to the terminal; of
the others the last words are kept. Where one fails, the rest are ended within seconds: none is left behind, not even
where this process is killed, for each watches the pipe that it has from here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

import click

from qtool import QtoolError
from qtool.cli.boundary import TRACEBACK, explain
from qtool.cli.processors import share_of
from qtool.make.group import seated
from qtool.runs import log

LAUNCHED = "QTOOL_LAUNCHED"  # in the environment of a rank: its standard input is the pipe to who started it
LOST = 70  # as quantize/ranks.py: the rank says that others are gone, they say why
GRACE = 3.0  # seconds in which ranks that lost another, or are told to end, may end by themselves
INTERRUPTED = 15.0  # the same after Ctrl-C: a layer that is being written is written to its end
KEPT = 4000  # bytes of a rank's last words
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass
class Rank:
    """A process, and what it said last (of rank 0 nothing: it speaks for itself)."""

    number: int
    process: subprocess.Popen[bytes]
    said: bytearray = field(default_factory=bytearray)
    reader: threading.Thread | None = None

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self.process.poll()

    def end(self, signum: int) -> None:
        """It and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def close(self) -> None:
        """Nothing of it is left."""
        self.end(signal.SIGKILL)
        self.process.wait()
        if self.reader is not None:
            self.reader.join(GRACE)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def cause(self) -> str:
        """Why it ended, in a line; empty where it said nothing, or said it itself."""
        code = self.process.returncode
        ended = -code if code < 0 else code - 128
        if ended > 0:
            return f"was ended by {signal.Signals(ended).name}."
        if self.reader is None:
            return ""
        self.reader.join(1)
        said = bytes(self.said).decode(errors="replace")
        return " ".join(said.rpartition("Error: ")[2].split()) if "Error: " in said else ""


def words_of(
    recipe: Path, only: Sequence[str], changes: Sequence[str], runs: Path, name: str, force: bool, profile: Path | None
) -> list[str]:
    """`qtool run` with these options, as each rank is started."""
    words = ["run", str(recipe), "--device", "cuda", "--runs", str(runs)]
    words += [word for output in only for word in ("--only", output)]
    words += [word for change in changes for word in ("--set", change)]
    words += ["--name", name] if name else []
    words += ["--force"] if force else []
    words += ["--profile", str(profile)] if profile else []
    words += {log.QUIET: ["-q"], log.VERBOSE: ["-v"]}.get(log.voice.level, [])
    return words + (["--log-json"] if log.voice.as_json else [])


def require_cards(gpus: int, device: str, environment: Mapping[str, str]) -> None:
    """Raises QtoolError for what is no set of cards. ``device``: as a user named it."""
    if gpus == 1:
        return
    if seated(environment):
        raise QtoolError("--gpus: torchrun has started several processes already. Give one of the two.")
    if device not in ("auto", "cuda"):
        raise QtoolError(
            f"--gpus {gpus} --device {device}: --gpus takes the cards cuda:0 to cuda:{gpus - 1}, a process each, and "
            "no processor. Leave one of the two out."
        )


class Unsaid(QtoolError):
    """What rank 0 finds too, and says."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Once is enough."""


@contextmanager
def alike(environment: Mapping[str, str]) -> Iterator[None]:
    """Around what all ranks do by themselves, each the same: the first one speaks."""
    if not seated(environment) or environment["RANK"] == "0":
        yield
        return
    log.speak(log.QUIET, log.voice.as_json)
    try:
        yield
    except QtoolError as error:
        raise Unsaid(error.message, error.exit_code) from error


@contextmanager
def named(rank: int, number: int) -> Iterator[None]:
    """What ends a rank alone says which it was; what all refuse alike, rank 0 says."""
    try:
        yield
    except QtoolError as error:
        if rank and type(error) is QtoolError:
            raise QtoolError(f"rank {rank} of {number}: {error.message}", error.exit_code) from error
        raise
    except Exception as error:  # whatever a library raises: here it is still known in which rank
        if number == 1 or os.environ.get(TRACEBACK):
            raise
        line = explain(error)
        raise QtoolError(f"rank {rank} of {number}: {line.message}", line.exit_code) from error


def launch(words: Sequence[str], number: int, environment: Mapping[str, str]) -> int:
    """Run ``qtool`` with ``words`` as ``number`` ranks; the exit code, as of one process."""
    port = _free_port()
    with _forwarding() as received:
        ranks: list[Rank] = []
        try:
            for rank in range(number):
                ranks.append(_start(words, rank, number, port, environment))
            return _watch(ranks, received)
        finally:
            for one in ranks:
                one.close()
            if sys.stderr.isatty():
                click.echo("\x1b[?25h", err=True, nl=False)  # the cursor, which a bar that was killed has hidden


def _start(words: Sequence[str], rank: int, number: int, port: int, environment: Mapping[str, str]) -> Rank:
    told = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, LAUNCHED: 1,
    }  # fmt: skip
    # gloo would look for the machine by its name, which a container may not know
    own = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    command = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "qtool", *words]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=None if rank == 0 else subprocess.PIPE,
        stderr=None if rank == 0 else subprocess.STDOUT,
        env=own
        | dict(environment)
        | share_of(number, environment)
        | {name: str(value) for name, value in told.items()},
        start_new_session=True,
    )
    started = Rank(rank, process)
    if process.stdout is not None:
        started.reader = threading.Thread(target=_keep, args=(process.stdout.fileno(), started.said), daemon=True)
        started.reader.start()
    return started


def _keep(descriptor: int, said: bytearray) -> None:
    with suppress(OSError):
        while words := os.read(descriptor, 1 << 16):
            said += words
            del said[:-KEPT]


def _watch(ranks: Sequence[Rank], received: list[int]) -> int:
    """Until all have ended, or one has failed and the rest were given their time."""
    order: list[Rank] = []  # as they ended
    deadline, told = float("inf"), 0
    while len(order) < len(ranks) and time.monotonic() < deadline:
        order += [rank for rank in ranks if rank not in order and rank.code is not None]
        if received and not told:
            told, deadline = 1, time.monotonic() + INTERRUPTED
            for rank in ranks:
                rank.end(received[0])
        elif deadline == float("inf") and any(rank.code for rank in order):
            deadline = time.monotonic() + GRACE
        time.sleep(0.02)
    first = ranks[0].code
    if received:
        code = 128 + received[0]
        if first != code:  # it could not say so
            click.echo("\nInterrupted. Run the same command again: it continues after what is finished.", err=True)
        return code
    failed = [rank for rank in order if rank.code]
    if not failed:
        return 0
    return _told(failed, len(ranks))


def _told(failed: Sequence[Rank], number: int) -> int:
    """One line of what began it, where rank 0 has not said it; the exit code. ``failed``: as they ended."""
    begun = [rank for rank in failed if rank.code != LOST] or list(failed)
    for rank in begun:
        code, cause = rank.process.returncode, rank.cause()
        if cause:
            break
        if rank.number == 0 and code != LOST:
            return int(code)  # it has said so
    else:
        rank, cause = begun[0], f"ended with exit code {begun[0].process.returncode}."
        code = 3
    name = f"rank {rank.number} of {number}"
    said = f"{cause if cause.startswith(name) else f'{name}: {cause}'} The other ranks were ended."
    if "Run the same command again" not in said:
        said += " Run the same command again: it continues after the last finished layer."
    click.echo(f"Error: {said}", err=True)
    return int(code) if 0 < code < LOST else 3


@contextmanager
def _forwarding() -> Iterator[list[int]]:
    """Signals that end a command, as they come: the ranks, in sessions of their own, are told by `_watch`."""
    received: list[int] = []

    def note(signum: int, _: FrameType | None) -> None:
        received.append(signum)

    before = {one: signal.signal(one, note) for one in ENDING if signal.getsignal(one) is not signal.SIG_IGN}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def follow(environment: Mapping[str, str]) -> None:
    """In a rank: end where who started it ends, however that comes."""
    if LAUNCHED in environment:
        threading.Thread(target=_until_left, name="follow", daemon=True).start()


def _until_left() -> None:
    with suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(os.getpid(), signal.SIGKILL)
