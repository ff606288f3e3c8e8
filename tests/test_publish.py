"""`qtool publish`: what it refuses, what it sends, and where a token could show."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hub_server import TOKEN
from safetensors.torch import save_file

from qtool.cli import main
from qtool.convert.files.manifest import Manifest, read_manifest
from qtool.convert.verify.checks import verify
from qtool.recipe.judging import PublishSection
from qtool.recipe.redaction import recipe_without_folders, without_folders
from qtool.runs import ledger
from qtool.runs.baseline import Baseline
from qtool.share import hub
from qtool.share import publish as publishing
from qtool.share.admission import Offer, offers, refusals

AWQ, NF4 = "my-org/tiny-AWQ-4bit", "my-org/tiny-NF4"


@pytest.fixture
def work(finished: Any, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may break: `runs/`, `artifacts/`."""
    shutil.copytree(finished.folder.parents[1], tmp_path / "work")
    return tmp_path / "work"


def call(work: Path, *words: str, what: str = "latest") -> Result:
    return CliRunner().invoke(main, ["publish", what, "--runs", str(work / "runs"), "--to", "my-org", *words])


def artifact(work: Path, name: str) -> Path:
    return next((work / "artifacts").glob(f"*-{name}"))


def change_result(work: Path, change: Any) -> None:
    (path,) = (work / "runs").glob("*/result.json")
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refused(result: Result, said: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    assert said in result.output


def test_a_run_is_published_and_a_second_time_nothing_is_new(hub_server: Any, work: Path) -> None:
    result = call(work, "--license", "mit")
    assert result.exit_code == 0, result.output
    assert sorted(hub_server.repos) == [AWQ, NF4]
    folder, files = artifact(work, "awq"), hub_server.files(AWQ)
    manifest = read_manifest(folder)
    assert {name: files[name] for name in manifest.files} == {n: (folder / n).read_bytes() for n in manifest.files}
    assert set(files) - set(manifest.files) == {
        ".gitattributes", "README.md", "qtool.json", "qtool-scores.json", "size-against-score.svg",
    }  # fmt: skip
    assert "published and read back" in result.output
    line = ledger.read(work / "runs")[-2]
    assert "run" not in line
    assert line["publish"]["artifacts"] == {"awq": manifest.key}
    assert line["publish"]["url"].startswith(f"{hub_server.endpoint}/{AWQ}/commit/")
    commits = len(hub_server.repos[AWQ].commits)

    again = call(work, "--license", "mit")
    assert again.exit_code == 0, again.output
    assert again.output.count("were there already, unchanged") == 2
    assert len(hub_server.repos[AWQ].commits) == commits


def test_what_was_published_verifies_where_it_is_downloaded(hub_server: Any, work: Path, tmp_path: Path) -> None:
    assert call(work, "--license", "mit", "--only", "awq").exit_code == 0
    for name, content in hub_server.files(AWQ).items():
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    assert verify(tmp_path / "got").sound
    scores = Baseline.model_validate_json((tmp_path / "got" / "qtool-scores.json").read_bytes())
    assert sorted(scores.subjects) == ["awq", "source"]


def test_one_repository_with_folders(hub_server: Any, work: Path) -> None:
    (recipe,) = (work / "runs").glob("*/recipe.yaml")
    recipe.write_text(recipe.read_text() + "publish: {to: x, layout: folders, license: mit}\n")
    result = call(work)
    assert result.exit_code == 0, result.output
    files = hub_server.files("my-org/tiny-quantized")
    assert {"awq/qtool.json", "nf4/qtool.json", "README.md", "qtool-scores.json"} <= set(files)


def test_what_somebody_publishes_meanwhile_is_not_overwritten(
    hub_server: Any, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(work, "--license", "mit", "--only", "awq").exit_code == 0
    chosen = publishing.stale_files

    def slowly(planned: publishing.PlannedRepository, remote: hub.Remote | None) -> list[str]:
        files = chosen(planned, remote)
        hub.publish(hub.Target(AWQ), [hub.upload_of("qtool.json", b"{}")], [], "theirs")
        return files

    monkeypatch.setattr(publishing, "stale_files", slowly)
    refused(call(work, "--license", "apache-2.0", "--only", "awq"), "somebody published there meanwhile", 2)
    assert hub_server.files(AWQ)["qtool.json"] == b"{}"


def test_a_pull_request_and_a_branch(hub_server: Any, work: Path) -> None:
    options = ("--license", "mit", "--only", "awq", "--private")
    assert call(work, *options, "--pr").exit_code == 0
    assert set(hub_server.files(AWQ)) == {".gitattributes"}
    assert hub_server.repos[AWQ].private
    assert call(work, *options, "--revision", "w4").exit_code == 0
    assert "qtool.json" in hub_server.files(AWQ, "w4")


def test_a_dry_run_prints_the_card_and_asks_nobody(hub_server: Any, work: Path) -> None:
    result = call(work, "--license", "mit", "--only", "awq", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "license: mit" in result.output
    assert "README.md" in result.output
    assert hub_server.requests == []


def test_an_artifact_alone_finds_the_run_that_judged_it(hub_server: Any, work: Path) -> None:
    assert call(work, "--license", "mit", what=str(artifact(work, "awq"))).exit_code == 0
    assert b"KL to source" in hub_server.files(AWQ)["README.md"]


def test_an_artifact_that_no_run_judged(hub_server: Any, work: Path) -> None:
    shutil.rmtree(work / "runs")
    what = str(artifact(work, "awq"))
    refused(call(work, "--license", "mit", what=what), "awq: no run judged it")
    assert call(work, "--license", "mit", "--allow-failed", what=what).exit_code == 0
    assert b"Published although it did not pass" in hub_server.files(AWQ)["README.md"]


@pytest.mark.parametrize("verdict", ["fail", "undecided"])
def test_a_gate_that_did_not_pass(hub_server: Any, work: Path, verdict: str) -> None:
    change_result(work, lambda data: data["verdicts"][0].update(verdict=verdict, reason="KL of 9"))
    result = call(work, "--license", "mit")
    refused(result, f"awq: gate {verdict}: ")
    assert "KL of 9" in result.output
    assert hub_server.repos == {}  # not even the one that passed
    assert call(work, "--license", "mit", "--allow-failed").exit_code == 0
    assert b"Published although it did not pass" in hub_server.files(AWQ)["README.md"]
    assert b"although" not in hub_server.files(NF4)["README.md"]


def test_no_gate_at_all(hub_server: Any, work: Path) -> None:
    change_result(work, lambda data: data.update(verdicts=[]))
    refused(call(work, "--license", "mit"), "awq: no gate judged it")


@pytest.mark.parametrize("allow", [(), ("--allow-failed",)])
def test_a_changed_file(hub_server: Any, work: Path, allow: tuple[str, ...]) -> None:
    path = artifact(work, "awq") / "generation_config.json"
    path.write_text(path.read_text() + " ")
    refused(call(work, "--license", "mit", *allow), "awq: files and sha256: generation_config.json has ")
    assert hub_server.repos == {}


def test_a_failed_verify(hub_server: Any, work: Path) -> None:
    save_file({"x": torch.zeros(2)}, artifact(work, "awq") / "model-extra.safetensors")
    refused(call(work, "--license", "mit", "--allow-failed"), "model-extra.safetensors")


def test_an_unfinished_artifact(hub_server: Any, work: Path) -> None:
    folder = artifact(work, "awq")
    partial = folder.rename(folder.with_name(folder.name + ".partial"))
    refused(call(work, "--license", "mit", "--allow-failed"), "is unfinished; run the recipe again")
    refused(call(work, what=str(partial)), "an unfinished artifact", 2)
    refused(call(work, what=str(folder)), "an unfinished artifact", 2)
    shutil.rmtree(partial)
    refused(call(work, "--license", "mit"), "is gone; run the recipe again")


def test_an_unknown_licence(hub_server: Any, work: Path) -> None:
    refused(call(work, "--allow-failed"), "the source's licence is unknown: neither its card nor a LICENSE file says")


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ({"license": "cc-by-nd-4.0"}, "forbids to share modified versions"),
        ({"license": "other"}, "`other` without a license_name"),
        ({"license": "other", "license_name": "iquestcoder"}, "neither a license_link nor a LICENSE file"),
        ({"license": "other", "license_name": "iquestcoder", "license_link": "https://example.org/LICENSE"}, None),
        ({"license": "apache-2.0"}, None),
    ],
)
def test_licences_of_the_source(work: Path, said: dict[str, str], fault: str | None) -> None:
    (found,) = offers("latest", work / "runs", ["awq"])
    manifest: Manifest = found.manifest.model_copy(update={"source": found.manifest.source | said})
    hard, soft, _ = refusals(Offer(found.name, found.path, manifest, found.run), PublishSection(to="my-org"))
    assert soft == []
    assert hard == [] if fault is None else fault in hard[0]


def test_a_repository_that_holds_something_else(hub_server: Any, work: Path) -> None:
    hub_server.put(AWQ, {"README.md": b"mine", "model.safetensors": b"mine"})
    refused(call(work, "--license", "mit", "--only", "awq"), "already holds something else", 2)
    assert hub_server.files(AWQ) == {"README.md": b"mine", "model.safetensors": b"mine"}


def test_a_repository_that_holds_another_artifact(hub_server: Any, work: Path) -> None:
    to = ("--license", "mit", "--to", "my-org/one")
    assert call(work, *to, "--only", "awq").exit_code == 0
    refused(call(work, *to, "--only", "nf4"), "already holds another artifact", 2)
    assert call(work, *to, "--only", "nf4", "--pr").exit_code == 0
    theirs = hub_server.files("my-org/one", "refs/pr/1")
    assert not any(name.startswith("qtool/") for name in theirs)  # the fold scales of the other are gone there


def test_input_that_names_nothing(hub_server: Any, work: Path) -> None:
    runs = ["--runs", str(work / "runs")]
    refused(CliRunner().invoke(main, ["publish", "latest", *runs]), "where to? Say --to org", 2)
    refused(call(work, "--only", "gptq"), "--only gptq: the run made awq, nf4", 2)
    refused(call(work, "--license", "mit", "--to", "my-org/{nonsense}"), "names no repository", 2)
    refused(call(work, "--license", "mit", "--to", "my-org/same"), "awq, nf4 would all go to my-org/same", 2)


def test_texts_lose_the_folders_of_this_machine() -> None:
    recipe = 'model: /home/me/My Models/m  # from /data/x/m\ncalibration: {text: "~/t/code.txt"}\nu: https://a.b/c/d\n'
    assert recipe_without_folders(recipe) == 'model: m  # from m\ncalibration: {text: "code.txt"}\nu: https://a.b/c/d\n'
    short = "model: /data/m\ncalibration: {text: corpora/data/x.jsonl}\noutput_dir: /data  # on /data/disk\nu: http://h/data\n"
    kept = "model: m\ncalibration: {text: corpora/data/x.jsonl}\noutput_dir: data  # on disk\nu: http://h/data\n"
    assert recipe_without_folders(short) == kept
    assert without_folders({"a": ["/x/y", "org/name", 3]}) == {"a": ["y", "org/name", 3]}
    served = (
        "evaluate: {engine: openai, base_url: 'http://me:pw@gpu7.corp:9000/v1'}  # not http://me:pw@gpu7.corp:9000/v1\n"
    )
    assert "gpu7" not in recipe_without_folders(served)
    assert "base_url: 'http://127.0.0.1:8000/v1'" in recipe_without_folders(served)
    asked = {"evaluate": {"base_url": "http://gpu7/v1"}, "other": {"base_url": None}}
    assert without_folders(asked) == {"evaluate": {"base_url": "http://127.0.0.1:8000/v1"}, "other": {"base_url": None}}


def test_no_file_that_is_published_names_a_folder_of_this_machine(hub_server: Any, work: Path, finished: Any) -> None:
    assert call(work, "--license", "mit").exit_code == 0
    for repo in (AWQ, NF4):
        for name, content in hub_server.files(repo).items():
            assert str(finished.folder.parents[2]).encode() not in content, name


@pytest.mark.parametrize("status", [200, 401, 403, 500])
def test_a_token_shows_nowhere(
    hub_server: Any, work: Path, status: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    if status != 200:
        hub_server.fail("POST", "/commit/", status=status, headers={"X-Error-Message": f"bad {TOKEN}"}, times=99)
    result = call(work, "--license", "mit", "--only", "awq")
    assert (result.exit_code == 0) == (status == 200)
    captured = capfd.readouterr()
    for text in (result.output, repr(result.exception), caplog.text, captured.out, captured.err):
        assert TOKEN not in text
        assert "secret-signature" not in text
    for path in (path for path in work.rglob("*") if path.is_file()):
        assert TOKEN.encode() not in path.read_bytes(), path
    for repo in hub_server.repos:
        assert not any(TOKEN.encode() in content for content in hub_server.files(repo).values())


def test_a_recipe_that_holds_the_token_is_not_published(hub_server: Any, work: Path) -> None:
    (recipe,) = (work / "runs").glob("*/recipe.yaml")
    recipe.write_text(recipe.read_text() + f"# {TOKEN}\n")
    result = call(work, "--license", "mit")
    refused(result, "README.md: contains your Hub token", 2)
    assert TOKEN not in result.output
    assert hub_server.repos == {}


@pytest.mark.slow
def test_the_command_itself_through_the_environment(hub_server: Any, work: Path) -> None:
    """Another process, HF_ENDPOINT and HF_TOKEN as a user sets them."""
    command = [
        sys.executable,
        "-m",
        "qtool",
        "publish",
        "latest",
        "--to",
        "my-org",
        "--license",
        "mit",
        "--only",
        "awq",
    ]
    environment = os.environ | {"HF_ENDPOINT": hub_server.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "published and read back" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert "qtool.json" in hub_server.files(AWQ)
