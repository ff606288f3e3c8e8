"""The journal of a task being scored: what was answered and judged so far, so that a killed run goes on from there."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.durable import naming, say, set_aside
from qtool.convert.files.reading import read_bytes
from qtool.evaluate.scorecard import ProblemOutcome

Place = tuple[str, int]  # problem id, number of the sample


@dataclass
class Journal:
    """Append-only JSON lines, each durable before `add` returns. ``texts``: answers that are not judged yet."""

    path: Path
    texts: dict[Place, str] = field(default_factory=dict)
    judged: dict[Place, ProblemOutcome] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Journal:
        """What an earlier run left, or an empty journal. A torn line (a kill, a power cut) is left out; other damage
        is said, and those answers are made again."""
        journal = cls(path)
        if not os.path.lexists(path):
            return journal
        try:
            lines = read_bytes(path).split(b"\n")
        except QtoolError as error:
            set_aside(path, error.message.removeprefix(f"{path}: "))
            return journal
        damaged = 0
        for line in lines[:-1]:
            try:
                if line:  # every line begins with the end of one that may have been torn
                    row = json.loads(line)
                    journal._take((row["problem"], row["sample"]), row)
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += 1
        if damaged:
            say(f"{path}: {damaged} damaged lines left out; what they held is made again.")
        return journal

    def _take(self, place: Place, row: dict[str, Any]) -> None:
        if "outcome" in row:
            self.judged[place] = ProblemOutcome.model_validate(
                {"outcome": row["outcome"], "detail": row["detail"], "completion": row["completion"]}
            )
            self.texts.pop(place, None)
        elif place not in self.judged:
            if not isinstance(row["completion"], str):
                raise ValueError("an answer is text")
            self.texts[place] = row["completion"]

    def answered(self, place: Place, text: str) -> None:
        """A model's answer."""
        self._write([{"problem": place[0], "sample": place[1], "completion": text}])
        self.texts[place] = text

    def add(self, outcomes: Iterable[tuple[Place, ProblemOutcome]]) -> None:
        """What became of answers."""
        rows = [
            (place, {"problem": place[0], "sample": place[1], **outcome.model_dump()}) for place, outcome in outcomes
        ]
        self._write([row for _, row in rows])
        for place, row in rows:
            self._take(place, row)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        # a newline first: a torn line must not swallow this one
        data = "".join(f"\n{json.dumps(row)}" for row in rows) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                if file.write(data.encode()) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
        except OSError as error:  # a failed write does not say which file it was
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """The score is saved: nothing is left to resume."""
        with naming(self.path):
            self.path.unlink(missing_ok=True)
