"""Where the work is done."""

from __future__ import annotations

import re

import torch

from qtool import QtoolError
from qtool.convert.files.reading import shown

DEVICE = re.compile(r"cpu|cuda(:(?P<number>\d{1,3}))?")


def choose_device(asked: str) -> torch.device:
    """`auto` takes an accelerator where there is one. Raises QtoolError for a name that is none of qtool's (exit 2) and
    for an accelerator that is not there (exit 3)."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        asked = "cuda" if there else "cpu"
    named_so = DEVICE.fullmatch(asked)
    if named_so is None:
        raise QtoolError(f"--device {shown(asked)}: is none of auto, cpu, cuda, cuda:N.")
    if asked != "cpu" and int(named_so["number"] or 0) >= there:
        seen = f"{there} accelerator{'s' if there > 1 else ''}, numbered from 0" if there else "no accelerator"
        raise QtoolError(f"--device {asked}: torch sees {seen} here. Use --device cpu.", exit_code=3)
    return torch.device(asked)
