"""The machine that an engine runs on: its name, and the memory that is taken."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine_name(device: str) -> str:
    """The card of ``cuda[:N]``, else this machine's processor with its cores; ``auto``: the card where there is one."""
    if device != "cpu":
        import torch

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def reset_resident_peak() -> None:
    """Let the kernel count this process's peak anew (Linux; elsewhere the peak is of the whole process's life)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def resident_peak() -> int | None:
    """Bytes of this process's resident peak: with the pages of files that it has mapped, which the kernel takes back
    whenever somebody asks for memory."""
    return _status("VmHWM")


def anonymous_memory() -> int | None:
    """Bytes that are this process's own now: no file holds them, so no one can take them back."""
    return _status("RssAnon")


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
    except (OSError, StopIteration):
        return None


def free_memory(device: str) -> int | None:
    """Bytes that a model may still take on ``cuda[:N]``, or of host memory; None where the system does not say."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(torch.device(device))[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def device_used() -> int | None:
    """Bytes taken on the accelerator, whoever took them."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free
