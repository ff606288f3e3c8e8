"""The journal of work that grows on the disk: a line for each finished step, durable before the next one begins.

A killed run continues after the last whole line and ends with the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from qtool.convert.files.durable import naming, say


class StepJournal:
    """The journal of a file that grows, open at its end: a line for each step, durable before `add` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming(path):
            self._file = path.open("ab", buffering=0)

    def add(self, step: dict[str, Any]) -> None:
        """Raises QtoolError (exit 3); half a line, should it be left, is cut off by `resume_journal`."""
        with naming(self.path):
            data = (json.dumps(step) + "\n").encode()
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def start_journal(path: Path, key: str) -> None:
    """A journal of the work ``key`` without a finished step."""
    with naming(path):
        path.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")


def journal_key(path: Path) -> str | None:
    """The work that a journal belongs to; None where there is no journal that says it."""
    try:
        with path.open("rb") as file:
            key = json.loads(file.readline(1 << 16))["key"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return key if isinstance(key, str) else None


def resume_journal(path: Path, key: str) -> list[dict[str, Any]] | None:
    """The finished steps of the work ``key``; None where there is no journal, or another work's.

    The steps are layers, in order. What follows the last good line is cut off: half a line is a step that was never
    finished; anything else is said, and its layers are made again.
    """
    if journal_key(path) != key:
        return None
    with naming(path):
        lines = path.read_bytes().splitlines(keepends=True)
        steps: list[dict[str, Any]] = []
        end = len(lines[0])
        for line in lines[1:]:
            step = _step(line)
            if step is None or step.get("layer", len(steps)) != len(steps):
                if line.endswith(b"\n"):
                    say(f"{path}: damaged after layer {len(steps)}; the layers behind it are made again.")
                break
            steps.append(step)
            end += len(line)
        os.truncate(path, end)
    return steps


def _step(line: bytes) -> dict[str, Any] | None:
    """A line of the journal; None where it is not whole."""
    try:
        step = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(step, dict) or not isinstance(records := step.get("records", {}), dict):
        return None
    rows = [row for row in records.values() if isinstance(row, dict)]
    numbers = all(isinstance(value, int | float) for row in rows for value in row.values())
    return step if numbers and len(rows) == len(records) else None
