"""`qtool runs`: what there is, what it is called, what is removed; and `--force` where another recipe's work lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qtool import QtoolError
from qtool.cli import main
from qtool.convert.files.manifest import read_manifest
from qtool.make.replacing import ASIDE
from qtool.runs.shelf import check_name, entries, find_any, find_run, give_name, name_of_run

STORED = Path(__file__).parent / "data" / "stored_run" / "00265698"


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A finished run, one that failed, one that did not end, an evaluation, one that is damaged, and what is no run."""
    folder = tmp_path / "runs"
    for name in ("aa11", "aa22", "bb33", "dd55"):
        shutil.copytree(STORED, folder / name)
    result = json.loads((folder / "aa22" / "result.json").read_text())
    result["verdicts"][0] |= {"verdict": "fail"}
    (folder / "aa22" / "result.json").write_text(json.dumps(result))
    (folder / "bb33" / "result.json").unlink()
    (folder / "cc44").mkdir()
    (folder / "cc44" / "scores.json").write_bytes((STORED / "scores.json").read_bytes())
    (folder / "dd55" / "lock.json").write_text("{")
    (folder / "references" / "x").mkdir(parents=True)
    return folder


def test_every_run_is_listed_with_what_became_of_it(runs: Path) -> None:
    states = {entry.id: entry.state for entry in entries(runs)}
    assert states["aa22"] == "failed"
    assert states["aa11"] in ("passed", "undecided", "failed", "no gates")
    assert (states["bb33"], states["cc44"], states["dd55"]) == ("not finished", "evaluation", "unreadable")
    listed = call("runs", "list", "--runs", runs)
    assert listed.exit_code == 0, listed.output
    assert max(map(len, listed.output.splitlines())) <= 80
    assert all(name in listed.output for name in states)
    assert not any(line.endswith(" ") for line in listed.output.splitlines())


def test_words_choose(runs: Path, tmp_path: Path) -> None:
    assert "aa22" in call("runs", "list", "failed", "qtool-demo", "--runs", runs).output
    chosen = call("runs", "list", "evaluation", "--runs", runs).output
    assert ("cc44" in chosen, "aa11" in chosen) == (True, False)
    assert "has no run of that kind, of 5" in call("runs", "list", "nothing-so", "--runs", runs).output
    assert "`qtool run demo` makes one" in call("runs", "list", "--runs", tmp_path / "none").output


def test_a_name_stands_for_a_run_in_every_command(runs: Path) -> None:
    assert call("runs", "name", "aa11", "nightly", "--runs", runs).exit_code == 0
    assert find_run("nightly", runs) == runs / "aa11"
    assert call("compare", "nightly", "aa11", "--runs", runs).exit_code == 0
    shown = call("runs", "show", "nightly", "--runs", runs)
    assert "sha256:" in shown.output
    assert "nightly" in call("runs", "list", "--runs", runs).output
    moved = call("runs", "name", "aa22", "nightly", "--runs", runs)
    assert moved.output.splitlines() == ["aa11 was called nightly before", "aa22: nightly"]
    assert (name_of_run(runs / "aa11"), name_of_run(runs / "aa22")) == ("", "nightly")


@pytest.mark.parametrize("name", ["latest", "", "a b", "../x", "-x", "a" * 61, "a\n"])
def test_what_cannot_be_a_name(name: str, runs: Path) -> None:
    with pytest.raises(QtoolError, match="--name"):
        check_name(name)
    with pytest.raises(QtoolError):
        give_name(runs / "aa11", name)


def test_a_name_that_somebody_wrote_is_not_believed(runs: Path) -> None:
    (runs / "aa11" / "name").write_text("\x1b[31mred")
    assert name_of_run(runs / "aa11") == ""


def test_remove_asks_for_a_yes_and_takes_the_folder_alone(runs: Path) -> None:
    refused = call("runs", "remove", "aa11", "--runs", runs)
    assert (refused.exit_code, (runs / "aa11").is_dir()) == (2, True)
    assert "Say --yes" in refused.output
    assert call("runs", "remove", "aa11", "dd55", "--yes", "--runs", runs).exit_code == 0
    assert sorted(path.name for path in runs.iterdir()) == ["aa22", "bb33", "cc44", "references"]
    for text, said in (("zz", "no such run"), ("", "no such run"), ("references", "no such run")):
        result = call("runs", "remove", text, "--yes", "--runs", runs)
        assert (result.exit_code, said in result.output) == (2, True), result.output
    (runs / "ee66").symlink_to(runs / "aa22")
    assert call("runs", "remove", "ee66", "--yes", "--runs", runs).exit_code == 2
    assert (runs / "aa22").is_dir()


def test_several_that_begin_so_are_not_guessed(runs: Path) -> None:
    with pytest.raises(QtoolError, match="several runs begin so"):
        find_any("aa", runs)
    assert find_any("latest", runs).id in {entry.id for entry in entries(runs)}


@pytest.mark.slow
def test_a_run_is_named_when_it_is_made_and_force_replaces_anothers_work(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    runs, artifact = tmp_path / "runs", tmp_path / "artifacts" / "tiny-awq"
    assert call("run", write_recipe(), "--runs", runs, "--name", "first").exit_code == 0
    ended = (find_run("first", runs) / "result.json").read_bytes()
    first = find_run("first", runs)
    changed = ["run", write_recipe(), "--set", "outputs.0.group_size=64", "--runs", runs]
    refused = call(*changed)
    assert (refused.exit_code, "--force replaces it" in refused.output) == (2, True), refused.output
    before = read_manifest(artifact).key
    forced = call(*changed, "--force", "--name", "first")
    assert forced.exit_code == 0, forced.output
    assert "was called first before" in forced.stderr
    assert read_manifest(artifact).key != before
    assert not artifact.with_name(artifact.name + ASIDE).exists()
    key = read_manifest(artifact).key
    assert call(*changed, "--force").exit_code == 0
    assert read_manifest(artifact).key == key, "its own work is used again"
    assert call("run", write_recipe(), "--runs", runs).exit_code == 2
    assert (first / "result.json").read_bytes() == ended, "a run that is refused leaves what an earlier one found"
    assert call("run", write_recipe(), "--runs", runs, "--name", "a/b").exit_code == 2


def test_force_touches_nothing_that_qtool_did_not_write(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    foreign = tmp_path / "artifacts" / "tiny-awq"
    foreign.mkdir(parents=True)
    (foreign / "model.safetensors").write_bytes(b"somebody's")
    result = call("run", write_recipe(), "--runs", tmp_path / "runs", "--force")
    assert (result.exit_code, (foreign / "model.safetensors").read_bytes()) == (2, b"somebody's"), result.output


@pytest.mark.slow
def test_an_interrupted_force_keeps_the_old_until_the_new_is_there(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtool.make.outputs import make_artifacts as made

    runs, artifact = tmp_path / "runs", tmp_path / "artifacts" / "tiny-awq"
    assert call("run", write_recipe(), "--runs", runs).exit_code == 0

    def fails(*_: object, **__: object) -> None:
        raise QtoolError("the disk is full", exit_code=3)

    monkeypatch.setattr("qtool.run.make_artifacts", fails)
    changed = ["run", write_recipe(), "--set", "outputs.0.group_size=64", "--runs", runs]
    assert call(*changed, "--force").exit_code == 3
    aside = artifact.with_name(artifact.name + ASIDE)
    assert read_manifest(aside).output["group_size"] == 32
    monkeypatch.setattr("qtool.run.make_artifacts", made)
    assert call(*changed).exit_code == 0, "goes on without --force"
    assert (aside.exists(), read_manifest(artifact).output["group_size"]) == (False, 64)
