"""What a conversion takes before it starts: device memory, host memory, disk, and time where the ledger knows it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.reading import named
from qtool.evaluate.engines import sweep_memory as sweep
from qtool.evaluate.engines.condition import PLAIN
from qtool.make.job import Job, device_kind
from qtool.make.output import Output
from qtool.make.peaks import Work
from qtool.quantize.survey import BY_HAND
from qtool.recipe.checking import digest_of
from qtool.recipe.sections import Recipe
from qtool.runs import ledger
from qtool.sizing.conditions import cache_bytes

GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Resources:
    """Bytes needed and there (None: cannot be told here). ``seconds``: shortest and longest that this kind of machine
    took for as many parameters and outputs, evaluation included; None where it never did. ``long``: of the long text
    that is asked for, if any: its tokens, and bytes of the device for one layer at a time; ``caches``: condition ("own"
    for none) -> bytes that one sequence of so many tokens keeps in it."""

    device: str
    device_bytes: int
    device_free: int | None
    host_bytes: int
    host_free: int | None
    disk_bytes: int
    disk_free: int
    disk_path: str
    seconds: tuple[float, float] | None
    long: tuple[int, int] | None = None
    caches: Mapping[str, int] = field(default_factory=dict)

    def short(self) -> list[str]:
        """What is short, a sentence each."""
        lacking = []
        long = 0 if self.long is None else self.long[1]
        there = self.host_free if self.device_free is None else self.device_free
        for what, need, free in (
            (f"{self.device} memory", self.device_bytes, self.device_free),
            (f"{self.device} memory for the long text", long, there),
            ("host memory", self.host_bytes, self.host_free),
            (f"disk at {self.disk_path}", self.disk_bytes, self.disk_free),
        ):
            if free is not None and need > free:
                lacking.append(f"{what}: {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
        return lacking

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"short": self.short()}


def needs_of(job: Job, runs: Path | None = None, pending: Sequence[Output] | None = None, cards: int = 1) -> Resources:
    """``pending``: the outputs still to be made (None: all). Space that a begun output has reserved already counts as
    there. Of several ``cards`` the one that takes most is told; host and disk are of all."""
    outputs = job.outputs if pending is None else pending
    work = Work(job.recipe.calibration, job.decoder, job.checkpoint.tensors, outputs, job.device)
    on_host = job.device.type == "cpu"
    parent = _existing(named(job.recipe.output_dir))
    return Resources(
        device="host" if on_host else device_kind(job.device) + (f" (each of {cards})" if cards > 1 else ""),
        device_bytes=0 if on_host else max(work.device_peaks(cards)),
        device_free=None if on_host else torch.cuda.mem_get_info(job.device)[0],
        host_bytes=work.host_peak(cards),
        host_free=host_memory(),
        disk_bytes=work.disk_bytes(),
        disk_free=shutil.disk_usage(parent).free,
        disk_path=str(parent),
        seconds=_seconds(job, outputs, runs) if runs is not None else None,
        long=_long(job, cards),
        caches=_caches(job),
    )


def refuse_what_cannot_be_measured(job: Job) -> None:
    """Raises QtoolError (exit 3) saying what is short."""
    work = Work(job.recipe.calibration, job.decoder, job.checkpoint.tensors, job.outputs, job.device)
    on_device, kept = work.measuring()
    on_host = job.device.type == "cpu"
    wanted = [("host memory", kept + (on_device if on_host else 0), host_memory())]
    if not on_host:
        wanted.append((f"{device_kind(job.device)} memory", on_device, torch.cuda.mem_get_info(job.device)[0]))
    for what, need, free in wanted:
        if free is not None and need > free:
            raise QtoolError(
                f"it cannot be measured here what types cost: {what}: {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB "
                f"free. Free some, take another --device, or {BY_HAND}.",
                exit_code=3,
            )


def _long(job: Job, cards: int) -> tuple[int, int] | None:
    asked, shape = job.recipe.evaluate.long, job.decoder.shape
    if asked is None:
        return None
    width = 4 if job.device.type == "cpu" else 2
    queries = sweep.queries_of(shape, asked.length)
    return asked.length, sweep.peak_bytes(shape, asked.length, queries, width, cards)


def _caches(job: Job) -> dict[str, int]:
    """At the long text's length, else at the longest that the model was made for."""
    asked, shape = job.recipe.evaluate, job.decoder.shape
    length = asked.long.length if asked.long else shape.max_context
    if not length or not (asked.long or asked.conditions):
        return {}
    conditions = [PLAIN, *(one.condition for one in asked.conditions)]
    return {one.name or "own": cache_bytes(shape, one, length) for one in conditions}


def refuse_what_cannot_finish(job: Job, pending: Sequence[Output], cards: int = 1) -> None:
    """Raises QtoolError (exit 3) saying all that is short, before anything is written."""
    short = needs_of(job, pending=pending, cards=cards).short()
    if short:
        raise QtoolError(
            f"this job cannot finish here: {'; '.join(short)}. Free some, set `output_dir:` to another disk, take "
            "fewer outputs (--only) or fewer calibration tokens (`calibration: {samples:, length:}`), or another "
            "--device.",
            exit_code=3,
        )


def host_memory() -> int | None:
    """Bytes that a process may still take: what the kernel says, less where a control group allows less."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return None
    try:
        most = int((GROUP / "memory.max").read_text())  # "max" where there is no limit
        stat = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        cached = int(stat["active_file"]) + int(stat["inactive_file"])  # files read: given up for whoever asks
        return min(available, most - int((GROUP / "memory.current").read_text()) + cached)
    except (OSError, ValueError, KeyError):
        return available


def like(recipe: Recipe) -> str:
    """A digest of what decides, beside model and outputs, how long a run takes: text, tasks, measurements, servers."""
    return digest_of(recipe.model_dump(mode="json", include={"calibration", "experts", "evaluate", "measure", "serve"}))


def _seconds(job: Job, outputs: Sequence[Output], runs: Path) -> tuple[float, float] | None:
    kind = device_kind(job.device)
    return forecast(job.recipe, outputs, runs, lambda device: device == kind)


def forecast(
    recipe: Recipe, outputs: Sequence[Output], runs: Path, alike: Callable[[str], bool]
) -> tuple[float, float] | None:
    """Seconds, the shortest and the longest, by runs in the ledger of ``runs`` on a device that is ``alike``, of the
    same text and tasks; None where there is none."""
    rates = []
    for entry in ledger.read(runs):
        made = entry.get("artifacts") or {}
        if entry.get("like") != like(recipe):
            continue
        if not alike(str(entry.get("device"))) or not made or not entry.get("seconds"):
            continue
        if set(made) - set(entry.get("made", made)):  # some were made by another run, in its seconds
            continue
        work = sum(8 * artifact["bytes"] / artifact["bpw"] for artifact in made.values() if artifact.get("bpw"))
        if work:
            rates.append(entry["seconds"] / work)
    work = max((output.plan.parameters for output in outputs), default=0) * len(outputs)
    return (min(rates) * work, max(rates) * work) if rates and work else None


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
