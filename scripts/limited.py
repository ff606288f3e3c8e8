"""A command whose memory has a limit, and what it took of it: its own (anonymous) and files read, apart.

The limit is a control group (version 2 or 1) where this process may make one, a scope of systemd where that runs, else
a watcher that ends the command once its own memory passes the limit (on a processor the kernel refuses more, too:
RLIMIT_DATA). A watcher counts no files read: the kernel gives those up for whoever asks.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

EVERY = 0.1  # seconds between two looks
SCOPE = ["systemd-run", "--scope", "--quiet", "--collect"]


@dataclass
class Used:
    """``how``: what held the limit; ``code``: how the command ended; peaks in bytes, ``anonymous`` and ``files`` of the
    group as the kernel counts them (of a watcher: of its processes), ``most`` of both together (0: not known)."""

    how: str
    code: int = 0
    seconds: float = 0.0
    said: str = ""
    anonymous: int = 0
    files: int = 0
    most: int = 0


@dataclass
class Limit:
    """``words``: put before the command; ``join``: called in the child; ``group``: where the kernel counts."""

    how: str
    words: Sequence[str] = ()
    join: Callable[[], None] | None = None
    group: Path | None = None
    bytes: int = 0
    _seen: list[int] = field(default_factory=lambda: [0, 0])

    def look(self, session: int) -> tuple[int, int]:
        """(anonymous, files) now."""
        if self.group is None:
            return of_session(session)
        stat = dict(line.split() for line in (self.group / "memory.stat").read_text().splitlines())
        names = ("anon", "file") if "anon" in stat else ("total_rss", "total_cache")
        return int(stat[names[0]]), int(stat[names[1]])

    @property
    def peak(self) -> int:
        """As the kernel counted, files read included."""
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            with suppress(OSError, TypeError):
                return int((self.group / name).read_text())  # type: ignore[operator]  # None: caught
        return 0


def run(words: Sequence[str], folder: Path, environment: Mapping[str, str], gib: float, card: bool) -> Used:
    """In ``folder``; ``card``: it computes on an accelerator, whose driver maps more than any RLIMIT_DATA."""
    with limit_of(int(gib * 2**30), card) as limit, tempfile.TemporaryFile() as out:
        used, began = Used(limit.how), time.monotonic()
        process = subprocess.Popen(
            [*limit.words, *words], cwd=folder, env=dict(environment), stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=limit.join,
        )  # fmt: skip
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(limit, process.pid, used, done))
        watcher.start()
        used.code = process.wait()
        done.set()
        watcher.join()
        used.seconds, used.most = time.monotonic() - began, limit.peak
        out.seek(0)
        used.said = out.read().decode(errors="replace")
        return used


def _watch(limit: Limit, session: int, used: Used, done: threading.Event) -> None:
    while not done.wait(EVERY):
        with suppress(OSError, ValueError, KeyError):
            anonymous, files = limit.look(session)
            used.anonymous, used.files = max(used.anonymous, anonymous), max(used.files, files)
            if limit.group is None and limit.bytes and anonymous > limit.bytes:
                used.how += ", which ended it"
                os.killpg(session, signal.SIGKILL)
                return


def of_session(session: int) -> tuple[int, int]:
    """(anonymous, files mapped) of the processes of a session."""
    anonymous = files = 0
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            if int((place / "stat").read_text().rpartition(")")[2].split()[3]) != session:
                continue
            for line in (place / "status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name == "RssAnon":
                    anonymous += int(value.split()[0]) * 1024
                elif name in ("RssFile", "RssShmem"):
                    files += int(value.split()[0]) * 1024
    return anonymous, files


@contextmanager
def limit_of(size: int, card: bool) -> Iterator[Limit]:
    """The first that this machine allows."""
    for make in (_second, _first):
        group = None
        with suppress(OSError):
            group = make(size)
        if group is not None:
            try:
                yield Limit(f"control group {group}", join=_joining(group), group=group, bytes=size)
            finally:
                with suppress(OSError):
                    group.rmdir()
            return
    if (
        shutil.which("systemd-run")
        and subprocess.run([*SCOPE, "true"], check=False, capture_output=True).returncode == 0
    ):
        most = ["-p", f"MemoryMax={size}", "-p", "MemorySwapMax=0"]
        yield Limit("a scope of systemd", [*SCOPE, *most], bytes=0)
        return
    refused = None if card else lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    yield Limit("a watcher" + ("" if card else " and RLIMIT_DATA"), join=refused, bytes=size)


def _joining(group: Path) -> Callable[[], None]:
    def join() -> None:
        (group / "cgroup.procs").write_text("0")

    return join


def _second(size: int) -> Path | None:
    """A group of version 2. Raises OSError where it may not be made."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    roots = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"]
    for root in roots or _mounted():
        if "memory" not in (root / "cgroup.controllers").read_text().split():
            continue
        if "memory" not in (root / "cgroup.subtree_control").read_text().split():
            (root / "cgroup.subtree_control").write_text("+memory")
        group = root / f"qtool-limit-{os.getpid()}"
        group.mkdir()
        try:
            (group / "memory.max").write_text(str(size))
        except OSError:
            group.rmdir()
            raise
        with suppress(OSError):
            (group / "memory.swap.max").write_text("0")
        return group
    return None


def _mounted() -> list[Path]:
    """Where version 2 is nowhere mounted: the same, mounted for as long as this machine runs, if that is allowed."""
    place = Path(tempfile.mkdtemp(prefix="qtool-groups-"))
    done = subprocess.run(["mount", "-t", "cgroup2", "none", str(place)], check=False, capture_output=True)
    return [] if done.returncode else [place]


def _first(size: int) -> Path | None:
    """The same of version 1."""
    root = Path("/sys/fs/cgroup/memory")
    if not (root / "memory.limit_in_bytes").exists():
        return None
    group = root / f"qtool-limit-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(size))
    return group
