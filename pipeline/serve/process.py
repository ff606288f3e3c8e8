"""A server's process: started in a group of its own, waited for, listened to, and ended whole.

Whatever happens here, nothing is left running: the group is asked to end, and killed where it does not.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from qtool import QtoolError
from qtool.evaluate.engines.server import Broken, open_url
from qtool.evaluate.sandbox.secrets import for_child, hidden

PATIENCE = 900.0  # seconds in which a server must be able to answer: weights are read, kernels compiled
GRACE = 15.0  # seconds that it has to end when it is asked to
POLL, DYING = 0.25, 1.0
FIRST, KEPT = 2000, 400  # lines of its log that are kept, of its beginning and of its end
LAST, CAUSES = 8, 4  # that are shown where it ended by itself: its last, and those before them that name an error
_CAUSE = re.compile(r"\b\w+(Error|Exception): |\b[Ee]rror: ")
LONGEST = 4096  # bytes of a line


@dataclass
class Server:
    """A started server. ``name``: the engine's; ``url``: where it answers, without /v1; ``first`` and ``lines``: the
    beginning and the end of its log, secrets removed."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    first: list[str] = field(default_factory=list)
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT))
    started: float = field(default_factory=time.monotonic)

    def log(self) -> list[str]:
        """What it said of itself when it started."""
        return list(self.first)

    def require_running(self) -> None:
        """Raises QtoolError (exit 3) with its last lines where it has ended."""
        code = self.process.poll()
        if code is not None:
            raise self.fault(f"ended by itself {_ended(code)} after {time.monotonic() - self.started:.0f} s")

    def explained(self, error: QtoolError, what: str) -> QtoolError:
        """Why a request failed: the server has ended, or it did ``what`` with the request, as ``error`` says."""
        with suppress(subprocess.TimeoutExpired):  # a connection breaks a moment before its process has ended
            self.process.wait(DYING)
        try:
            self.require_running()
        except QtoolError as ended:
            return ended
        return self.fault(f"{what}: {error.message.rstrip('.')}")

    def fault(self, what: str) -> QtoolError:
        """One line on what is wrong, and the last of what the server said."""
        time.sleep(POLL)  # its last words may still be on their way
        told = [line for line in list(self.lines) if line.strip()]
        causes = dict.fromkeys(line for line in told[:-LAST] if _CAUSE.search(line))
        said = [*list(causes)[-CAUSES:], *told[-LAST:]]
        shown = "\n".join(f"  | {line[:300]}" for line in said)
        return QtoolError(f"{self.name}: the server {what}." + (f" It said last:\n{shown}" if shown else ""), 3)

    def resident(self) -> int | None:
        """Bytes that its processes hold of memory, shared pages counted once (Linux)."""
        sizes = [size for pid in group_of(self.process.pid) if (size := _proportional(pid)) is not None]
        return sum(sizes) if sizes else None


@contextmanager
def start(
    name: str, words: tuple[str, ...], environment: Mapping[str, str], url: str, health: str,
    patience: float = PATIENCE, echo: Callable[[str], None] | None = None,
) -> Iterator[Server]:  # fmt: skip
    """Start ``words``, wait until ``url`` answers, and end the whole group when the block ends. ``echo`` is given each
    line of its log. Raises QtoolError (exit 3): the port is taken, the program cannot be started, it ended, or did not
    answer in time."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    require_free(host.strip("[]"), int(port))
    told = for_child(os.environ) | {"DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"} | dict(environment)
    try:
        process = subprocess.Popen(
            words, env=told, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise QtoolError(f"{words[0]}: cannot be started: {error.strerror or error}.", exit_code=3) from error
    server = Server(name, url, process)
    listener = threading.Thread(target=_listen, args=(server, echo), daemon=True)
    try:
        listener.start()
        _wait(server, url + health, patience)
        yield server
    finally:
        end(process)
        listener.join(GRACE)
        if process.stdout is not None and not listener.is_alive():
            process.stdout.close()


def require_free(host: str, port: int) -> None:
    """Raises QtoolError (exit 3) where something listens there already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise QtoolError(
                f"port {port} on {host} is in use ({error.strerror}). Take another: --port {port + 1}.", exit_code=3
            ) from error


def free_port(host: str = "127.0.0.1") -> int:
    """One that nobody listens on."""
    with socket.socket() as trial:
        trial.bind((host, 0))
        return int(trial.getsockname()[1])


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to end, kill what is left of it, and wait."""
    _signal(process.pid, signal.SIGTERM)
    until = time.monotonic() + GRACE
    try:
        while time.monotonic() < until and (process.poll() is None or group_of(process.pid)):
            time.sleep(0.05)
    finally:  # a second Ctrl-C comes here, too
        _signal(process.pid, signal.SIGKILL)
        process.wait()


def _wait(server: Server, url: str, patience: float) -> None:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        server.require_running()
        with suppress(Broken, QtoolError), open_url(url, None, None, timeout=5.0) as answer:
            if answer.status == 200:
                server.require_running()  # another may have taken the port in between
                return
        time.sleep(POLL)
    raise server.fault(f"did not answer at {url} within {patience:.0f} s")


def _listen(server: Server, echo: Callable[[str], None] | None) -> None:
    assert server.process.stdout is not None
    environment = dict(os.environ)
    for raw in iter(lambda: server.process.stdout.readline(LONGEST), b""):  # type: ignore[union-attr]
        text = hidden(raw.decode("utf-8", "replace").rstrip(), environment)
        line = "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
        if len(server.first) < FIRST:
            server.first.append(line)
        server.lines.append(line)
        if echo is not None:
            echo(line)


def _ended(code: int) -> str:
    if code < 0:
        with suppress(ValueError):
            name = signal.Signals(-code).name
            return f"({name}{': memory ran out, most likely' if name == 'SIGKILL' else ''})"
    return f"(code {code})"


def _signal(group: int, signum: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)


def group_of(group: int) -> list[int]:
    """Processes of a group that have not ended (Linux; elsewhere none is known)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            _, _, rest = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")
            state, _, of_group = rest.split()[:3]
            if int(of_group) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def _proportional(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return None
