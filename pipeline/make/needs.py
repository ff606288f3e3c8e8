"""What a conversion takes before it starts: device memory, host memory, disk, and time where the ledger knows it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.reading import named
from qtool.convert.files.writer import Spec, file_sizes
from qtool.make.job import Job, device_kind
from qtool.quantize.memory import peak_bytes, score_bytes
from qtool.quantize.methods.sections import GgufMethod, Method, Nf4Method
from qtool.runs import ledger

GIB = 2**30
GROUP = Path("/sys/fs/cgroup")
LIBRARIES = GIB  # torch, transformers and the rest in host memory
TOKENIZER_AND_CONFIG = 32 * 2**20  # sidecars carried along, the manifest


@dataclass(frozen=True)
class Needs:
    """Bytes needed and there (None: cannot be told here). ``seconds``: shortest and longest that this kind of machine
    took for as many parameters and outputs, evaluation included; None where it never did."""

    device: str
    device_bytes: int
    device_free: int | None
    host_bytes: int
    host_free: int | None
    disk_bytes: int
    disk_free: int
    disk_path: str
    seconds: tuple[float, float] | None

    def short(self) -> list[str]:
        """What is short, a sentence each."""
        found = []
        for what, need, free in (
            (f"{self.device} memory", self.device_bytes, self.device_free),
            ("host memory", self.host_bytes, self.host_free),
            (f"disk at {self.disk_path}", self.disk_bytes, self.disk_free),
        ):
            if free is not None and need > free:
                found.append(f"{what}: {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
        return found

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"short": self.short()}


def needs_of(job: Job, runs: Path | None = None, pending: Sequence[Method] | None = None) -> Needs:
    """``pending``: the outputs still to be made (None: all that were planned). Space that a begun output has reserved
    already counts as there."""
    methods = [m for m in (job.recipe.outputs if pending is None else pending) if m.name in job.plans]
    peak = peak_of(job, methods) if methods else 0
    layer = max(_layer_bytes(job), _largest(job)) if methods else 0
    on_host = job.device.type == "cpu"
    disk = sum(_disk(job, method) for method in methods if not any(job.partial(method).glob("*")))
    parent = _existing(named(job.recipe.output_dir))
    return Needs(
        device="host" if on_host else device_kind(job.device),
        device_bytes=0 if on_host else peak,
        device_free=None if on_host else torch.cuda.mem_get_info(job.device)[0],
        host_bytes=(peak if on_host else 0) + 2 * layer + (LIBRARIES if methods else 0),
        host_free=host_memory(),
        disk_bytes=disk,
        disk_free=shutil.disk_usage(parent).free,
        disk_path=str(parent),
        seconds=_seconds(job, methods, runs) if runs is not None else None,
    )


def peak_of(job: Job, methods: Sequence[Method]) -> int:
    """Bytes on the computing device while these outputs are made."""
    text, device = job.recipe.calibration, job.device.type
    shapes = {name: info.shape for name, info in job.checkpoint.tensors.items()}
    scores = score_bytes(job.decoder.shape, text.samples, text.length, device)
    return peak_bytes(job.decoder, shapes, methods, text.samples * text.length, device, scores)


def refuse_what_cannot_finish(job: Job, pending: Sequence[Method]) -> None:
    """Raises QtoolError (exit 3) saying all that is short, before anything is written."""
    short = needs_of(job, pending=pending).short()
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


def print_needs(needs: Needs) -> None:
    """A line for each resource, then what is short."""
    from rich.console import Console

    console = Console()
    short = needs.short()
    console.print("[red]cannot finish here[/]" if short else "[green]this job fits[/]")
    rows = [("host memory", needs.host_bytes, needs.host_free), (f"disk at {needs.disk_path}", needs.disk_bytes,
            needs.disk_free)]  # fmt: skip
    if needs.device != "host":
        rows.insert(0, (f"{needs.device} memory", needs.device_bytes, needs.device_free))
    for what, need, free in rows:
        there = "" if free is None else f", {free / 1e9:.2f} GB free"
        console.print(f"{what}: {need / 1e9:.2f} GB{there}", highlight=False, soft_wrap=True)
    if needs.seconds is None:
        console.print("time: not known; no earlier run on this kind of machine is in the ledger", highlight=False)
    else:
        low, high = needs.seconds
        console.print(f"time: {low:.0f} to {high:.0f} s, as earlier runs on this kind of machine took", highlight=False)
    for line in short:
        console.print(f"short of {line}", highlight=False, soft_wrap=True)


def _layer_bytes(job: Job) -> int:
    """The stored bytes of the largest layer; two are in host memory at once, one read ahead."""
    sizes = dict.fromkeys(range(job.decoder.shape.layers), 0)
    for name, info in job.checkpoint.tensors.items():
        layer = job.decoder.layer_of(name)
        if layer is not None:
            sizes[layer] += info.nbytes
    return max(sizes.values())


def _largest(job: Job) -> int:
    return max(info.nbytes for info in job.checkpoint.tensors.values())


def _disk(job: Job, method: Method) -> int:
    """What an output's folder takes: weights and headers, fold scales or importance rows, and the sidecars."""
    plan = job.plans[method.name]
    extra: dict[str, Spec] = {}
    for linear in plan.linears:
        if not isinstance(method, GgufMethod | Nf4Method):
            extra[f"{linear.name}.rows"] = (torch.float32, (linear.out,))
            extra[f"{linear.name}.columns"] = (torch.float32, (linear.columns,))
        elif isinstance(method, GgufMethod) and method.needs_importance:
            extra[linear.name] = (torch.float32, (linear.columns,))
    beside = sum(file_sizes(extra).values()) * (2 if isinstance(method, GgufMethod) else 1)  # rows, then imatrix.gguf
    weights = plan.nbytes if isinstance(method, GgufMethod) else sum(file_sizes(plan.specs).values())
    return weights + beside + TOKENIZER_AND_CONFIG


def _seconds(job: Job, methods: Sequence[Method], runs: Path) -> tuple[float, float] | None:
    if not methods:
        return None
    parameters = max(plan.parameters for plan in job.plans.values())
    rates = []
    for entry in ledger.read(runs):
        made = entry.get("artifacts") or {}
        if entry.get("device") != device_kind(job.device) or not made or not entry.get("seconds"):
            continue
        work = sum(8 * artifact["bytes"] / artifact["bpw"] for artifact in made.values() if artifact.get("bpw"))
        if work:
            rates.append(entry["seconds"] / work)
    work = parameters * len(methods)
    return (min(rates) * work, max(rates) * work) if rates else None


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
