"""What a run says while it works: from the first second, at least once a minute, for people or for programs; and how
the seconds of its sessions add up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from qtool.cli import main
from qtool.make import progress
from qtool.make.job import device_kind
from qtool.make.needs import like
from qtool.recipe.sections import load_recipe
from qtool.runs import ledger, log
from qtool.runs.record import load_run
from qtool.runs.sessions import SESSIONS, Session, added, stored, working
from qtool.runs.stages import stage


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    yield
    log.speak(log.NORMAL, False)


class Clock:
    """Seconds that pass only when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_step_of_minutes_is_told_of_at_least_once_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    stages = progress.Stages(lines=True, get_time=clock)
    stages.add_task("quantizing layers", total=80, completed=10)
    for _ in range(50):  # as the thread does that looks every five seconds
        clock.now += progress.LOOK
        stages.say_slow_ones()
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == ["quantizing layers: 10 of 80", "quantizing layers: 10 of 80 after 0:30",
                        "quantizing layers: 10 of 80 after 1:00"]  # fmt: skip
    assert len(said) == 1 + 250 // 30
    assert progress.BEAT + progress.LOOK <= 60


def test_the_thread_that_looks_ends_with_its_stages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOOK", 0.01)
    monkeypatch.setattr(progress, "BEAT", 0.05)
    with progress.Stages(lines=True) as stages:
        stages.add_task("waiting", total=2)
        deadline = time.monotonic() + 10
        while len(said := capsys.readouterr().err.splitlines()) < 1 and time.monotonic() < deadline:
            time.sleep(0.1)
    assert said[0].startswith("waiting: 0 of 2")
    time.sleep(0.1)
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_log_names_the_run_and_its_stages(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    result = call("run", write_recipe(), "--runs", tmp_path / "runs")
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/lock.json"))
    said = result.stderr.splitlines()
    assert said[0] == "opening recipe.yaml"
    assert said[1].startswith("tiny (")
    assert said[1].endswith(f"on {load_run(folder).lock.device}: awq; run {folder.name} in {folder}")
    assert "quantizing layers: 0 of 2" in said
    again = call("run", tmp_path / "recipe.yaml", "--runs", tmp_path / "runs")
    assert "finished before and unchanged, used again: awq" in again.stderr
    assert again.stderr.splitlines()[-1].startswith("nothing was left to do")


@pytest.mark.slow
def test_quiet_says_nothing_verbose_every_step(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    quiet = call("run", write_recipe(), "--runs", tmp_path / "runs", "-q")
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert "report:" in quiet.stdout
    verbose = call("run", write_recipe(output_dir=str(tmp_path / "b")), "--runs", tmp_path / "runs", "-v")
    assert any(line.startswith("  writing awq: ") and line.endswith(" s") for line in verbose.stderr.splitlines())
    assert "  writing awq" not in call("run", write_recipe(), "--runs", tmp_path / "runs").stderr


def test_json_is_one_object_a_line_and_errors_are_too(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    result = call("run", write_recipe(), "--runs", tmp_path / "runs", "--log-json", "-v")
    said: list[dict[str, Any]] = [json.loads(line) for line in result.stderr.splitlines()]
    assert [entry["event"] for entry in said][:3] == ["stage", "step", "begin"]
    begin = next(entry for entry in said if entry["event"] == "begin")
    assert (begin["outputs"], (tmp_path / "runs" / begin["run"]).is_dir()) == (["awq"], True)
    last = [entry for entry in said if entry["event"] == "progress"][-1]
    assert set(last) == {"time", "event", "text", "stage", "done", "total", "seconds", "to_go", "doing"}
    wrong = call("run", write_recipe(), "--only", "nf4", "--log-json")
    error = json.loads(wrong.stderr.splitlines()[-1])
    assert (error["event"], error["exit_code"], wrong.exit_code) == ("error", 2, 2)
    assert "--only nf4" in error["text"]


# --- sessions -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sessions_add_up_and_one_that_reused_everything_changes_nothing(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    two = [{"method": "awq", "group_size": 32}, {"method": "awq", "name": "rtn", "group_size": 32, "rounding": "rtn"}]
    recipe = write_recipe(outputs=two)
    assert call("run", recipe, "--runs", runs, "--only", "awq").exit_code == 0
    (folder,) = (path.parent for path in runs.glob("*/lock.json"))
    first = load_run(folder)
    assert call("run", recipe, "--runs", runs).exit_code == 0
    second = load_run(folder)
    sessions = stored(folder)
    assert [session.made for session in sessions] == [["awq"], ["rtn"]]
    assert second.seconds == pytest.approx(sum(session.seconds for session in sessions), abs=0.3)
    assert second.stages["rounding"] > first.stages["rounding"]
    assert call("run", recipe, "--runs", runs).exit_code == 0
    third = load_run(folder)
    assert (third.seconds, third.stages, third.peaks) == (second.seconds, second.stages, second.peaks)
    entries = ledger.read(runs)
    assert [entry["seconds"] for entry in entries[1:]] == [second.seconds] * 2
    assert entries[-1]["made"] == ["awq", "rtn"]


def test_a_session_that_ends_by_an_error_is_noted_too(tmp_path: Path) -> None:
    def breaks() -> None:
        with working() as session:
            session.folder = tmp_path
            with stage("sealing", "awq"):
                pass
            raise RuntimeError

    with pytest.raises(RuntimeError):
        breaks()
    with (tmp_path / SESSIONS).open("a") as file:
        file.write('{"began": "torn by a power c')
    (kept,) = stored(tmp_path)
    assert (kept.made, kept.worked) == (["awq"], True)
    with working() as later:
        later.folder = tmp_path
        whole = later.whole()
    assert (whole.made, whole.seconds) == (["awq"], kept.seconds), "a session without work adds nothing"


def test_sums_of_sessions() -> None:
    one = Session(began="a", seconds=2.5, stages={"x": 1.0}, peaks={"resident": 9}, made=["awq"], scored=[])
    two = Session(began="b", seconds=1.0, stages={"x": 0.5, "y": 2.0}, peaks={"resident": 7}, made=[], scored=["awq"])
    assert added([one, two]) == Session(
        began="a", seconds=3.5, stages={"x": 1.5, "y": 2.0}, peaks={"resident": 9}, made=["awq"], scored=["awq"]
    )


def test_the_planner_learns_from_runs_that_made_what_they_have(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, runs = write_recipe(), tmp_path / "runs"
    device = device_kind(torch.device("cpu"))
    entry = {"device": device, "artifacts": {"awq": {"bytes": 10**6, "bpw": 8.0}}, "seconds": 4.0, "made": []}
    entry["like"] = like(load_recipe(recipe))
    ledger.append(runs, entry)
    assert "time: not known" in call("plan", recipe, "--runs", runs).output
    ledger.append(runs, entry | {"made": ["awq"]})
    assert "time: about" in call("plan", recipe, "--runs", runs).output
