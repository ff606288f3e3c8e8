"""The append-only log of all runs: one JSON line each, in `runs/ledger.jsonl`."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from qtool.convert.files.durable import naming, set_aside
from qtool.convert.files.reading import read_bytes

LEDGER = "ledger.jsonl"


def append(runs: Path, entry: dict[str, Any]) -> None:
    """Add one line and make it durable. A single write, so that two runs side by side cannot mix their lines; it begins
    with the end of a line that a power cut tore."""
    path = runs / LEDGER
    if os.path.lexists(path) and not path.is_file():
        set_aside(path, "not a file")
    line = (json.dumps(entry, sort_keys=True) + "\n").encode()
    with naming(path):
        runs.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(runs: Path) -> list[dict[str, Any]]:
    """All entries, oldest first; lines that a power cut tore are left out. Raises QtoolError where it is no file."""
    path = runs / LEDGER
    entries = []
    for line in read_bytes(path).splitlines() if os.path.lexists(path) else []:
        with suppress(ValueError):
            entries.append(from_json(line))  # of bounded depth: a million brackets are refused after a few hundred
    return [entry for entry in entries if isinstance(entry, dict)]
