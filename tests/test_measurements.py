"""Measurements in the ledger: which a report shows, how a recipe has them made, and what reaches the child process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.progress import Progress

from qtool import QtoolError
from qtool.cli import main
from qtool.convert.files.checkpoint import Checkpoint
from qtool.evaluate.engines.machine import machine_name
from qtool.measure.measure import measure
from qtool.measure.run import measure_subjects
from qtool.measure.subjects import Subject, source_subject
from qtool.preparing import prepare
from qtool.recipe.judging import MeasureSection
from qtool.recipe.sections import load_recipe
from qtool.run import run
from qtool.runs import ledger
from qtool.runs.measurements import Measurement, Row, from_json, less_device_memory, log, measured_models, one_machine
from qtool.runs.record import load_run

SECTION = MeasureSection(context=16, tokens=4, repeats=1)


def made(**changes: Any) -> Measurement:
    rows = (Row(16, 1, "ok", "", {"p50": 0.1}, 0.01, 90.0, 9.0, None, None, {"device": 900, "resident": 70}),)
    base = Measurement("k", "m", "transformers", "torch 2", "card", 4, 1, "2026-01-01T00:00:00", rows)
    return replace(base, **changes)


def test_the_ledger_keeps_everything(tmp_path: Path) -> None:
    log(tmp_path, made())
    (entry,) = ledger.read(tmp_path)
    assert entry["kind"] == "measure"
    assert from_json(entry) == made()
    with pytest.raises(ValueError, match="rows"):
        from_json({"key": "k", "rows": 3})


def test_the_newest_of_the_same_model_and_way_is_shown(tmp_path: Path) -> None:
    ledger.append(tmp_path, {"kind": "measure", "rows": []})  # of an older qtool: it names no model
    ledger.append(tmp_path, {"run": "x"})
    ledger.append(tmp_path, {"kind": "measure", "key": "k", "rows": "of a newer qtool"})
    slow = made(rows=(replace(made().rows[0], step_seconds=1.0),))
    for measurement in (slow, made(time="2026-01-02"), made(key="other"), made(engine="vllm", time="2026-01-03")):
        log(tmp_path, measurement)
    found = measured_models(tmp_path, {"awq": "k", "gone": "nobody"})
    assert {name: [m.engine for m in kept] for name, kept in found.items()} == {"awq": ["vllm", "transformers"]}
    assert found["awq"][1].rows[0].step_seconds == 0.01


def test_a_failure_is_said_until_something_was_measured(tmp_path: Path) -> None:
    log(tmp_path, made(rows=(), why="needs gptqmodel"))
    assert measured_models(tmp_path, {"awq": "k"})["awq"][0].why == "needs gptqmodel"
    log(tmp_path, made())
    assert [m.why for m in measured_models(tmp_path, {"awq": "k"})["awq"]] == [""]
    log(tmp_path, made(rows=(), why="no room", engine="vllm"))
    assert [m.why for m in measured_models(tmp_path, {"awq": "k"})["awq"]] == [""]


def test_a_column_never_mixes_machines() -> None:
    measured = {
        "source": [made(machine="laptop", time="3"), made(machine="card", time="1")],
        "awq": [made(machine="card", time="4")],
        "nf4": [made(machine="laptop", time="2")],
    }
    laptop = {"source": "laptop", "nf4": "laptop"}
    card = {"source": "card", "awq": "card"}
    assert {name: m.machine for name, m in one_machine(measured).items()} == card  # as many models, and later
    more = measured | {"gguf": [made(machine="laptop", time="0")]}
    assert {name: m.machine for name, m in one_machine(more).items()} == laptop | {"gguf": "laptop"}
    assert one_machine({"awq": [made(rows=(), why="no room")]}) == {}


def test_what_another_process_holds_on_the_card_is_not_the_models() -> None:
    assert less_device_memory(made(), 300).rows[0].memory == {"device": 600, "resident": 70}


def test_a_machine_has_a_name() -> None:
    assert machine_name("cpu").endswith(" cores")
    assert len(machine_name("cpu")) > len("8 cores")


@pytest.mark.slow
def test_a_recipe_has_every_model_measured_once(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the test's own process instead of another, which takes seconds to start."""
    started: list[Any] = []

    def here(words: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append((words, env))
        done = CliRunner().invoke(main, words[4:])
        return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)

    monkeypatch.setattr("qtool.measure.run.subprocess.run", here)
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    outputs = [{"method": "nf4"}, {"method": "awq", "group_size": 32}]
    recipe = write_recipe(outputs=outputs, measure={"context": [16, 32], "tokens": 4, "repeats": 1})
    done = run(recipe, tmp_path / "runs", "cpu")
    assert [words[5].rsplit("/", 1)[-1] for words, _ in started] == ["tiny", "tiny-nf4", "tiny-awq"]
    assert not any("hf_planted" in value for _, env in started for value in env.values())
    assert [row.context for row in done.summary.measured["source"][0].rows] == [16, 32]
    assert done.summary.measured["nf4"][0].key == done.lock.artifacts["nf4"].key
    assert done.summary.measured["nf4"][0].first is not None
    assert "gptqmodel" in done.summary.measured["awq"][0].why
    assert load_run(done.folder).summary.measured == done.summary.measured
    report = (tmp_path / "out.html", CliRunner().invoke(main, ["report", str(done.folder), "--out", str(tmp_path)]))
    assert report[1].exit_code == 0
    assert "Memory and speed" in (tmp_path / "report.html").read_text()
    started.clear()
    again = run(recipe, tmp_path / "runs", "cpu")
    assert [words[5].rsplit("/", 1)[-1] for words, _ in started] == ["tiny-awq"]  # what failed is tried again
    assert again.summary.measured["source"] == done.summary.measured["source"]


@pytest.mark.slow
def test_in_a_process_of_its_own(tiny: Path, tmp_path: Path) -> None:
    subject = source_subject(Checkpoint.open(tiny), "commit")
    with Progress(disable=True) as bar:
        measure_subjects(SECTION, [subject, Subject("served", "k")], torch.device("cpu"), False, tmp_path, bar)
    (entry,) = ledger.read(tmp_path)
    measurement = from_json(entry)
    assert (measurement.key, measurement.model, measurement.why) == ("commit", "source", "")
    assert measurement.first is not None


@pytest.mark.parametrize(
    ("code", "said", "why"),
    [
        (-9, "", "killed by signal 9; memory ran out, most likely"),
        (3, "a warning\nError: x: cannot load it\n", "x: cannot load it"),
        (1, "Traceback\nValueError: odd\n", "ValueError: odd"),
        (4, "Loading weights:  50%|#####     | 1/2\n", "its process ended with code 4"),
    ],
)
def test_why_nothing_was_measured(
    code: int, said: str, why: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], code, "", said)
    monkeypatch.setattr("qtool.measure.run.subprocess.run", lambda *_, **__: done)
    with Progress(disable=True) as bar:
        subject = source_subject(Checkpoint.open(tiny), "commit")
        measure_subjects(SECTION, [subject], torch.device("cpu"), False, tmp_path, bar)
    (entry,) = ledger.read(tmp_path)
    assert why in entry["why"]
    assert entry["rows"] == []


def test_longer_than_the_context_is_refused_before_any_work(write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(QtoolError, match="measure: a prompt of 250 tokens and 64 generated are more than the 256 that"):
        prepare(write_recipe(measure={"context": 250}), "cpu")


def test_measuring_makes_no_other_run(write_recipe: Callable[..., Path]) -> None:
    plain = load_recipe(write_recipe())
    assert load_recipe(write_recipe(measure={"context": [128, 256], "batch": [1, 8]})).digest == plain.digest


def test_the_command_prints_what_it_would_log(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty(*arguments: Any) -> Iterator[Row]:
        print("GPT-QModel says hello")
        yield from measure(*arguments)

    monkeypatch.setattr("qtool.measure.run.measure", chatty)
    words = ["measure", str(tiny), "--context", "16", "--batch", "1", "--tokens", "4", "--repeats", "1", "--device"]
    result = CliRunner().invoke(main, [*words, "cpu", "--no-log", "--json", "--runs", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert from_json(json.loads(result.stdout)).first is not None
    assert not (tmp_path / "ledger.jsonl").exists()
