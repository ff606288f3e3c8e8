"""Stage times: sums by stage, threads side by side in a trace that Chrome reads, nothing where no run is recorded."""

from __future__ import annotations

import json
import mmap
import threading
import time
from pathlib import Path

import pytest

from qtool.runs import stages
from qtool.runs.evidence import spent_text
from qtool.runs.stages import Span, largest, peaks, recording, seconds_of, stage, write_trace

SPANS = [
    Span("rounding", "layer 0", "MainThread", 10.0, 12.0),
    Span("writing", "awq: layer 0", "writer", 12.0, 12.5),
    Span("rounding", "layer 1", "MainThread", 12.0, 15.0),
]


def test_stages_of_threads_add_up_and_faults_end_them() -> None:
    def work() -> None:
        with stage("writing"):
            time.sleep(0.02)

    with recording() as spans:
        thread = threading.Thread(target=work, name="writer")
        thread.start()
        with pytest.raises(ValueError, match="inside"), stage("rounding", "layer 0"):
            raise ValueError("inside")
        thread.join()
    assert {(span.stage, span.thread) for span in spans} == {("rounding", "MainThread"), ("writing", "writer")}
    assert seconds_of(spans)["writing"] >= 0.02
    with stage("later"):
        pass
    assert len(spans) == 2


def test_memory_of_ones_own_is_stated_apart(tmp_path: Path) -> None:
    """A mapped file is resident, and not the process's own."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(200 * 2**20)
    with recording(), path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        begun = peaks()["resident"]
        assert sum(mapped[at] for at in range(0, len(mapped), 4096)) == 0
        taken = bytearray(50 * 2**20)
        taken[::4096] = bytes([1]) * len(taken[::4096])
        time.sleep(3 * stages.SAMPLED)
        found = peaks()
    assert found["anonymous"] >= 50 * 2**20
    assert found["resident"] >= begun + 50 * 2**20
    assert found["resident"] - found["anonymous"] > 100 * 2**20


def test_the_sums() -> None:
    assert seconds_of(SPANS) == {"rounding": 5.0, "writing": 0.5}
    said = spent_text(129.3, {"opening": 5.71, "tokenizing": 0.04}, {"resident": 1_300_000_000})
    assert said == "129 s: opening 5.7; at most 1.30 GB resident"
    assert spent_text(3.0, {}, {}) == "3 s"  # a run of an older qtool


def test_the_trace(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", SPANS)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == ["MainThread", "writer"]
    drawn = [(e["name"], e["tid"], e["ts"], e["dur"], e["args"]["detail"]) for e in events if e["ph"] == "X"]
    assert drawn == [
        ("rounding", 0, 0, 2_000_000, "layer 0"),
        ("writing", 1, 2_000_000, 500_000, "awq: layer 0"),
        ("rounding", 0, 2_000_000, 3_000_000, "layer 1"),
    ]


def test_of_several_processes_the_largest_peak_counts() -> None:
    assert largest([{"resident": 3, "device": 1}, {"resident": 2, "device": 5}, {"resident": 4}]) == {
        "resident": 4,
        "device": 5,
    }
