"""The sessions of a run: it may be interrupted and go on, or be run again when all is there. Seconds of those that
worked add up; one that reused everything changes nothing."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from qtool.convert.files.reading import read_text
from qtool.runs.stages import Span, largest, peaks, recording, seconds_of

SESSIONS = "sessions.jsonl"


class Session(BaseModel):
    """One process's part. ``made``: outputs it wrote; ``scored``: models it asked or measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    began: str
    seconds: float
    stages: dict[str, float]
    peaks: dict[str, int]
    made: list[str]
    scored: list[str]

    @property
    def worked(self) -> bool:
        """Whether anything was made or scored."""
        return bool(self.made or self.scored)


@dataclass
class Working:
    """The session of this process, from its beginning. ``folder``: the run's, once it is known; ``beside``: what other
    processes, which made and scored artifacts with this one, did."""

    spans: list[Span]
    folder: Path | None = None
    told: Session | None = None  # as the run's result has it
    beside: Sequence[Session] = ()
    began: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    started: float = field(default_factory=time.monotonic)

    def so_far(self) -> Session:
        """What it took and did until now."""
        made = [span.detail.partition(": ")[0] for span in self.spans if span.stage in ("writing", "sealing")]
        made += [name for other in self.beside for name in other.made]
        asked = [span.detail.partition(": ")[0] for span in self.spans if span.stage in ("fidelity", "tasks")]
        asked += [name for other in self.beside for name in other.scored]
        most = largest([peaks(), *(other.peaks for other in self.beside)])
        return Session(
            began=self.began, seconds=round(time.monotonic() - self.started, 1), stages=seconds_of(self.spans),
            peaks=most, made=list(dict.fromkeys(made)), scored=list(dict.fromkeys(asked)),
        )  # fmt: skip

    def whole(self) -> Session:
        """This session and those before it that worked, as one; where none did, this one alone."""
        now = self.told = self.so_far()
        before = [session for session in stored(self.folder) if session.worked] if self.folder else []
        return added([*before, now] if now.worked or not before else before)


def heard(told: Sequence[Any]) -> list[Session]:
    """Sessions that other processes told; None of one that did not."""
    return [Session.model_validate(session) for session in told if session is not None]


@contextmanager
def working() -> Iterator[Working]:
    """The block as a session; noted in its run's folder however it ends, if it came so far that there is one."""
    with recording() as spans:
        session = Working(spans)
        try:
            yield session
        finally:
            if session.folder is not None and session.folder.is_dir():
                with suppress(OSError), (session.folder / SESSIONS).open("a", encoding="utf-8") as file:
                    file.write((session.told or session.so_far()).model_dump_json() + "\n")


def stored(folder: Path) -> list[Session]:
    """Those that ended, oldest first; lines that a kill tore are left out."""
    found = []
    if (folder / SESSIONS).is_file():
        for line in read_text(folder / SESSIONS).splitlines():
            with suppress(ValidationError):
                found.append(Session.model_validate_json(line))
    return found


def added(sessions: Sequence[Session]) -> Session:
    """Several as one: seconds add up, of peaks the largest counts."""
    stages: dict[str, float] = {}
    most: dict[str, int] = {}
    for session in sessions:
        for name, seconds in session.stages.items():
            stages[name] = round(stages.get(name, 0.0) + seconds, 2)
        for place, peak in session.peaks.items():
            most[place] = max(peak, most.get(place, 0))
    return Session(
        began=sessions[0].began, seconds=round(sum(session.seconds for session in sessions), 1), stages=stages,
        peaks=most, made=list(dict.fromkeys(name for session in sessions for name in session.made)),
        scored=list(dict.fromkeys(name for session in sessions for name in session.scored)),
    )  # fmt: skip
