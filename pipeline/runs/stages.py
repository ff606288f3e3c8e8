"""What a run spends its time on: stages with their seconds, the peak of memory, and a trace that browsers draw.

A stage is noted where its work is done: `with stage("rounding", "layer 3"):`. Stages of several threads lie side by
side and then add up to more than the run took.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.convert.files.durable import write_whole
from qtool.evaluate.engines.machine import anonymous_memory, resident_peak
from qtool.runs import log


@dataclass(frozen=True)
class Span:
    """A stretch of one stage: ``begun`` and ``ended`` in seconds of `time.monotonic`; ``thread``: its name."""

    stage: str
    detail: str
    thread: str
    begun: float
    ended: float


SAMPLED = 0.05
_anonymous = [0]
_spans: list[Span] | None = None  # of the run that this process records; appended to by any thread


@contextmanager
def recording() -> Iterator[list[Span]]:
    """The spans of the block, as they end. Meanwhile a thread looks at the process's own memory."""
    global _spans
    before, _spans = _spans, []
    _anonymous[0], ended = 0, threading.Event()
    watching = threading.Thread(target=_watch, args=(ended,), name="memory", daemon=True)
    watching.start()
    try:
        yield _spans
    finally:
        ended.set()
        watching.join()
        _spans = before


def _watch(ended: threading.Event) -> None:
    """No kernel counts this peak."""
    while not ended.wait(SAMPLED):
        _anonymous[0] = max(_anonymous[0], anonymous_memory() or 0)


@contextmanager
def stage(name: str, detail: str = "") -> Iterator[None]:
    """Note the block's time under ``name``, where a run is recorded."""
    begun = time.monotonic()
    try:
        yield
    finally:
        ended = time.monotonic()
        if _spans is not None:
            _spans.append(Span(name, detail, threading.current_thread().name, begun, ended))
        said = f"{name} {detail}".strip()
        log.say(
            f"  {said}: {ended - begun:.1f} s", "step", log.VERBOSE, stage=name, detail=detail, seconds=ended - begun
        )


def seconds_of(spans: Sequence[Span]) -> dict[str, float]:
    """Stage -> seconds, in the order in which the stages began."""
    found: dict[str, float] = {}
    for span in sorted(spans, key=lambda span: span.begun):
        found[span.stage] = found.get(span.stage, 0.0) + span.ended - span.begun
    return {name: round(seconds, 2) for name, seconds in found.items()}


def peaks() -> dict[str, int]:
    """Bytes: the largest resident memory of this process; the largest that was its own, looked at `SAMPLED` seconds
    apart while a run is recorded; and what torch took of an accelerator at most."""
    found = {"resident": resident_peak() or 0, "anonymous": _anonymous[0]}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["device"] = torch.cuda.max_memory_allocated()
    return {name: peak for name, peak in found.items() if peak}


def largest(found: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Of several processes' peaks: what the one that took most took."""
    return {name: max(peak[name] for peak in found if name in peak) for one in found for name in one}


def write_trace(path: Path, spans: Sequence[Span]) -> None:
    """The spans as Chrome's trace events (https://ui.perfetto.dev and chrome://tracing open them). Raises QtoolError
    (exit 3) where ``path`` cannot be written."""
    start = min((span.begun for span in spans), default=0.0)
    threads = list(dict.fromkeys(span.thread for span in spans))
    process = os.getpid()
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": process, "tid": number, "args": {"name": name}}
        for number, name in enumerate(threads)
    ]
    events += [
        {
            "name": span.stage, "ph": "X", "pid": process, "tid": threads.index(span.thread),
            "ts": round(1e6 * (span.begun - start)), "dur": round(1e6 * (span.ended - span.begun)),
            "args": {"detail": span.detail},
        }
        for span in sorted(spans, key=lambda span: span.begun)
    ]  # fmt: skip
    write_whole(path, json.dumps({"traceEvents": events}) + "\n")
