"""`qtool pull` from a Hub on 127.0.0.1: what arrives is verified, and what cannot be is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qtool.cli import main
from qtool.recipe.judging import EvaluateSection, FidelitySection
from qtool.run import run
from qtool.runs.record import RunRecord
from qtool.share.pull import asked_again

REPO = "my-org/tiny-AWQ-4bit"


@pytest.fixture
def published(hub_server: Any, finished: Any, tmp_path: Path) -> Any:
    """`finished`, published without touching its ledger."""
    from qtool.share.admission import accept, offers
    from qtool.share.publish import plan, send, with_options

    section = with_options(None, "my-org", license="mit")
    (planned,) = plan(accept(offers(str(finished.folder), Path("none"), ["awq"]), section, False), section)
    send(planned)
    return hub_server


def pull(tmp_path: Path, runs: Path, *words: str) -> Result:
    options = ["--into", str(tmp_path / "got"), "--runs", str(runs), *words]
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["pull", REPO, *options])


def replace(server: Any, name: str, content: bytes) -> None:
    server.put(REPO, server.files(REPO) | {name: content})


def test_it_arrives_verified_and_its_scores_are_those_known_here(published: Any, finished: Any, tmp_path: Path) -> None:
    result = pull(tmp_path, finished.folder.parent)
    assert result.exit_code == 0, result.output
    assert "sound" in result.output
    assert "checked: size and bits a weight: as published" in result.output
    assert "A: as published; B: as measured here" in result.output
    sent = published.files(REPO)
    assert {name: (tmp_path / "got" / name).read_bytes() for name in sent} == sent
    assert pull(tmp_path, finished.folder.parent).exit_code == 0  # into the same folder again


def test_scores_unknown_here_are_said_not_to_be_checked(published: Any, tmp_path: Path) -> None:
    result = pull(tmp_path, tmp_path / "runs")
    assert result.exit_code == 0, result.output
    assert "not checked: scores: " in result.output
    assert "has no scores of this artifact" in " ".join(result.output.split())


def test_another_size_in_the_evidence(published: Any, tmp_path: Path) -> None:
    evidence = json.loads(published.files(REPO)["qtool-scores.json"])
    evidence["subjects"]["awq"]["nbytes"] -= 1
    replace(published, "qtool-scores.json", json.dumps(evidence).encode())
    result = pull(tmp_path, tmp_path / "runs")
    assert result.exit_code == 1
    assert "FAILED: qtool-scores.json gives another size than the manifest" in result.output


def test_scores_of_another_artifact(published: Any, tmp_path: Path) -> None:
    evidence = json.loads(published.files(REPO)["qtool-scores.json"])
    evidence["subjects"]["awq"]["key"] = "f" * 64
    replace(published, "qtool-scores.json", json.dumps(evidence).encode())
    result = pull(tmp_path, tmp_path / "runs")
    assert result.exit_code == 1
    assert "FAILED: qtool-scores.json has no scores of this artifact" in result.output


def test_no_evidence(published: Any, tmp_path: Path) -> None:
    published.put(REPO, {n: c for n, c in published.files(REPO).items() if n != "qtool-scores.json"})
    result = pull(tmp_path, tmp_path / "runs")
    assert result.exit_code == 0
    assert "not checked: no qtool-scores.json was published" in result.output


def test_a_file_that_was_changed_there(published: Any, tmp_path: Path) -> None:
    replace(published, "generation_config.json", published.files(REPO)["generation_config.json"] + b" ")
    result = pull(tmp_path, tmp_path / "runs")
    assert result.exit_code == 1
    assert "NOT sound" in result.output


def test_a_manifest_that_reaches_out_of_its_folder(published: Any, tmp_path: Path) -> None:
    manifest = json.loads(published.files(REPO)["qtool.json"])
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}
    replace(published, "qtool.json", json.dumps(manifest).encode())
    result = pull(tmp_path, tmp_path / "runs")
    assert result.exit_code == 2
    assert "names a file outside its folder (../../secret)" in result.output


def test_what_qtool_did_not_publish(hub_server: Any, tmp_path: Path) -> None:
    result = pull(tmp_path, tmp_path / "runs")
    assert result.exit_code == 2
    assert "no such repository or revision on the Hub" in result.output
    hub_server.put(REPO, {"README.md": b"x"})
    result = pull(tmp_path, tmp_path / "runs")
    assert result.exit_code == 2
    assert "holds no qtool.json" in result.output
    assert not (tmp_path / "got").exists()


def test_a_folder_that_holds_something_else(published: Any, tmp_path: Path) -> None:
    (tmp_path / "got").mkdir()
    (tmp_path / "got/mine.txt").write_text("mine")
    result = pull(tmp_path, tmp_path / "runs")
    assert result.exit_code == 2
    assert "exists and was not pulled from the Hub" in result.output


def test_a_revision(published: Any, tmp_path: Path) -> None:
    result = pull(tmp_path, tmp_path / "runs", "--revision", "nowhere")
    assert result.exit_code == 2
    assert "no such repository or revision" in result.output
    head = published.repos[REPO].branches["main"]
    assert pull(tmp_path, tmp_path / "runs", "--revision", head).exit_code == 0


@pytest.mark.slow
def test_reproduce_fetches_what_is_not_a_folder(published: Any, finished: Any) -> None:
    recipe = finished.recipe
    text = {"text": recipe.calibration} if isinstance(recipe.calibration, str) else recipe.calibration
    options = ["--device", "cpu", "--source", str(recipe.model), "--text", str(text["text"])]
    result = CliRunner().invoke(main, ["reproduce", REPO, *options])
    assert result.exit_code == 0, result.output
    assert "the same bit for bit" in result.output
    missing = CliRunner().invoke(main, ["reproduce", "my-org/nothing-there", *options])
    assert missing.exit_code == 2
    assert "my-org/nothing-there" in missing.output


@pytest.fixture(scope="module")
def elsewhere(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """A run that asked what any machine can ask again."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "recipe.yaml").write_text(
        f"model: {tiny}\ncalibration: {{text: heldout-code, samples: 4, length: 32}}\noutput_dir: {folder / 'a'}\n"
        "outputs: [{method: awq, group_size: 32, scaling: none, rounding: rtn}]\ngates: [{max_kld: 9}]\n"
        "evaluate:\n  tasks: [{task: handwritten, limit: 2}]\n  max_new_tokens: 4\n"
        "  text: {text: heldout-code, samples: 2, length: 32}\n"
    )
    return run(folder / "recipe.yaml", folder / "runs", "cpu")


@pytest.fixture
def asked(hub_server: Any, elsewhere: RunRecord) -> Any:
    """That run's artifact on the Hub."""
    from qtool.share.admission import accept, offers
    from qtool.share.publish import plan, send, with_options

    section = with_options(None, "my-org", license="mit")
    (planned,) = plan(accept(offers(str(elsewhere.folder), Path("none"), ["awq"]), section, False), section)
    send(planned)
    return hub_server


@pytest.mark.slow
def test_scored_here_and_compared(asked: Any, tiny: Path, tmp_path: Path) -> None:
    result = pull(tmp_path, tmp_path / "mine", "--score", "--source", str(tiny), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "A: as published; B: as measured here" in result.output
    assert "not checked" not in result.output
    assert "handwritten" in result.output
    assert "KL" in result.output
    assert list((tmp_path / "mine").glob("*/scores/handwritten*.json"))


@pytest.mark.slow
def test_without_its_source_there_is_no_kl(asked: Any, tmp_path: Path) -> None:
    result = pull(tmp_path, tmp_path / "mine", "--score", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "not checked: KL: needs --source" in result.output
    assert "handwritten" in result.output


def test_a_changed_artifact_is_not_asked(asked: Any, tmp_path: Path) -> None:
    replace(asked, "generation_config.json", asked.files(REPO)["generation_config.json"] + b" ")
    assert pull(tmp_path, tmp_path / "mine", "--score", "--device", "cpu").exit_code == 1
    assert not list((tmp_path / "mine").glob("*/scores/*"))


def test_a_strangers_questions_are_made_safe(tmp_path: Path) -> None:
    (tmp_path / "here.jsonl").write_text("{}")
    hostile = EvaluateSection.model_validate(
        {
            "tasks": [
                {"task": "handwritten"}, {"task": str(tmp_path / "here.jsonl")}, {"task": "../x"}, {"task": "a.jsonl"},
                {"task": "humaneval", "file": "/etc/passwd"},
            ],
            "text": {"text": "/etc/passwd"}, "sandbox": "none",
        }
    )  # fmt: skip
    section, left_out = asked_again(hostile, with_text=True)
    assert section is not None
    assert [task.task for task in section.tasks] == ["handwritten"]
    assert (section.text, section.sandbox) == (None, "auto")
    assert len(left_out) == 5
    server = EvaluateSection(tasks=hostile.tasks, engine="openai", base_url="http://127.0.0.1:1/v1")
    assert asked_again(server, True) == (None, ["scores: were made through a server, which is not asked again"])
    assert asked_again(None, True) == (None, ["scores: the card does not say what was asked"])
    assert asked_again(EvaluateSection(text=FidelitySection(text="heldout-code")), False)[0] is None


@pytest.mark.parametrize("name", ["nonsense", "a/b/c", "https://hub/a/b", "../x y", ""])
def test_what_is_no_name_of_a_repository(name: str, tmp_path: Path) -> None:
    said = CliRunner().invoke(main, ["pull", name, "--into", str(tmp_path / "got")])
    assert said.exit_code == 2
    assert "is no name of a repository" in said.output
