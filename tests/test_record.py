"""A run's folder tells the whole run: read back equal, found by name, refused when incomplete."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qtool import QtoolError
from qtool.runs import ledger, record
from qtool.runs.record import RunRecord, load_run
from qtool.runs.shelf import find_run
from qtool.runs.summary import stored_summary


@pytest.fixture
def copied(finished: RunRecord, tmp_path: Path) -> Path:
    """The run's folder alone, moved away from its artifacts."""
    folder = tmp_path / "runs" / finished.folder.name
    shutil.copytree(finished.folder, folder)
    return folder


def test_the_folder_tells_the_run(finished: RunRecord) -> None:
    again = load_run(finished.folder)
    assert (again.recipe, again.lock, again.verdicts) == (finished.recipe, finished.lock, finished.verdicts)
    assert again.scores == finished.scores
    assert set(again.folders) == {"awq", "nf4"}
    assert {name: found.checks for name, found in again.checks.items()} == {
        name: found.checks for name, found in finished.checks.items()
    }
    assert again.summary == finished.summary
    assert stored_summary(finished.folder, again.summary.evidence) == again.summary  # the run stored that very one
    assert list(again.summary.models) == ["source", "awq", "nf4"]
    # it has one: the run was sized
    assert again.summary.models["source"].size.bits_per_weight == 16.0  # type: ignore[union-attr]
    assert not again.failed
    (questions,) = again.questions().values()
    assert questions == {"t/0": 'def f(x: int) -> int:\n    """Do it."""\n'}


def test_it_outlives_its_artifacts(copied: Path, finished: RunRecord) -> None:
    moved = load_run(copied)
    assert moved.folders == {}
    assert moved.summary == finished.summary
    assert moved.manifests == finished.manifests
    assert moved.scores == finished.scores


def test_an_artifact_that_became_another_is_not_this_runs(finished: RunRecord, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    shutil.copytree(finished.folder, folder)
    shutil.copytree(finished.folders["awq"], tmp_path / "a")
    lock = json.loads((folder / "lock.json").read_text())
    lock["artifacts"]["awq"]["path"] = "../../a"
    (folder / "lock.json").write_text(json.dumps(lock))
    assert set(load_run(folder).folders) == {"awq"}
    lock["artifacts"]["awq"]["key"] = "other"
    (folder / "lock.json").write_text(json.dumps(lock))
    assert load_run(folder).folders == {}


def test_a_run_is_named_by_its_beginning(copied: Path) -> None:
    runs, name = copied.parent, copied.name
    assert find_run(name[:3], runs) == copied
    assert find_run(str(copied), runs) == copied
    with pytest.raises(QtoolError, match=r"latest: .* has no finished run"):
        find_run("latest", runs)
    ledger.append(runs, {"run": name})
    ledger.append(runs, {"run": "deleted"})
    assert find_run("latest", runs) == copied
    with pytest.raises(QtoolError, match=rf"zz: no such run; .* has {name}"):
        find_run("zz", runs)
    (runs / "unfinished").mkdir()
    with pytest.raises(QtoolError, match="no such run"):
        find_run("unfin", runs)
    shutil.copytree(copied, runs / (name[:5] + "-2"))
    with pytest.raises(QtoolError, match="several runs begin so"):
        find_run(name[:3], runs)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("result.json", None, "did not reach its end"),
        ("recipe.yaml", None, "not a run"),
        ("scores.json", None, "holds no scores"),
        ("lock.json", None, "lock.json: No such file"),
        ("lock.json", "{}", "not written by this version of qtool"),
        ("manifests/awq.json", None, "awq.json: No such file"),
    ],
)
def test_incomplete_runs_are_refused(copied: Path, file: str, content: str | None, message: str) -> None:
    (copied / file).unlink()
    if content is not None:
        (copied / file).write_text(content)
    with pytest.raises(QtoolError, match=message) as error:
        load_run(copied)
    assert error.value.exit_code == 2


def test_a_missing_score_is_named(copied: Path) -> None:
    next((copied / "scores").glob("fidelity-*")).unlink()
    with pytest.raises(QtoolError, match=r"\.json: No such file"):
        load_run(copied)


def test_an_old_end_is_withdrawn_once_something_is_made_anew(copied: Path, finished: RunRecord) -> None:
    record.begin(copied, finished.recipe_text)
    assert load_run(copied).finished == finished.finished
    record.withdraw(copied)
    with pytest.raises(QtoolError, match="did not reach its end"):
        load_run(copied)


def test_a_line_that_a_power_cut_tore_costs_no_other(tmp_path: Path) -> None:
    ledger.append(tmp_path, {"run": "one"})
    with (tmp_path / ledger.LEDGER).open("a") as file:
        file.write('{"run": "to')
    assert ledger.read(tmp_path) == [{"run": "one"}]
    ledger.append(tmp_path, {"run": "three"})
    ledger.append(tmp_path, {"run": "four"})
    assert [entry["run"] for entry in ledger.read(tmp_path)] == ["one", "three", "four"]
    (tmp_path / ledger.LEDGER).write_bytes(b'{"run": "five"}\n\x00\x00\xff\n7\n')
    assert ledger.read(tmp_path) == [{"run": "five"}]


def test_a_folder_of_runs_that_is_a_link(finished: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`..` of what a link leads to is not the folder that the link lies in."""
    real, place = tmp_path / "disk" / "deep" / "runs", tmp_path / "work"
    (real / "one").mkdir(parents=True)
    shutil.copytree(finished.folders["nf4"], place / "artifacts" / "nf4")
    (place / "runs").symlink_to(real)
    monkeypatch.chdir(place)
    for artifact in (Path("artifacts/nf4"), place / "artifacts" / "nf4"):
        entry = record.locked(artifact, Path("runs/one"))
        assert (Path("runs/one") / entry.path).samefile(artifact)
        there = record._there(Path("runs/one"), entry)
        assert there is not None
        assert there[0] == Path("artifacts/nf4")
    (place / "plain").mkdir()
    assert record.locked(Path("artifacts/nf4"), Path("plain/one")).path == "../../artifacts/nf4"


def test_what_a_kill_left_among_the_manifests_is_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / "run" / "manifests" / f"nf4.json.{dead.pid}.01234567.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"{")
    record.begin(tmp_path / "run", "model: x\n")
    assert not left.exists()
