"""The append-only log of all runs: one JSON line each, in `runs/ledger.jsonl`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

LEDGER = "ledger.jsonl"


def append(runs: Path, entry: dict[str, Any]) -> None:
    """Add one line and make it durable. A single write, so that two runs side by side cannot mix their lines."""
    runs.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(entry, sort_keys=True) + "\n").encode()
    descriptor = os.open(runs / LEDGER, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(runs: Path) -> list[dict[str, Any]]:
    """All entries, oldest first; a torn last line (power cut) is left out."""
    path = runs / LEDGER
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
