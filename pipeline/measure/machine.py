"""The machine that measures: its name, and what others held of its memory meanwhile."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path

from qtool.runs.measurements import Measurement


def machine_name(device: str) -> str:
    """The card of ``cuda[:N]``, else this machine's processor with its cores; ``auto``: the card where there is one."""
    if device != "cpu":
        import torch

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {os.cpu_count()} cores"


def less_device_memory(measurement: Measurement, taken: int) -> Measurement:
    """Without the ``taken`` bytes that another process held on the card all the while."""
    rows = []
    for row in measurement.rows:
        memory = dict(row.memory or {})
        if (device := memory.get("device")) is not None:
            memory["device"] = max(0, device - taken)
        rows.append(replace(row, memory=memory or None))
    return replace(measurement, rows=tuple(rows))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
