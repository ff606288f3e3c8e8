"""The append-only log of all runs: one JSON line each, in `runs/ledger.jsonl`."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

LEDGER = "ledger.jsonl"


def append(runs: Path, entry: dict[str, Any]) -> None:
    """Add one line and make it durable. A single write, so that two runs side by side cannot mix their lines; it begins
    with the end of a line that a power cut tore."""
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / LEDGER
    line = (json.dumps(entry, sort_keys=True) + "\n").encode()
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        line = b"\n" + line
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(runs: Path) -> list[dict[str, Any]]:
    """All entries, oldest first; lines that a power cut tore are left out."""
    path = runs / LEDGER
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]
