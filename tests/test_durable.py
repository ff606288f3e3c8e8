"""Stored files: whole or absent, damaged ones set aside, one writer at a time, nothing left of the dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool import QtoolError
from qtool.convert.files import durable
from qtool.convert.files.durable import require_writable
from qtool.convert.files.journal import resume_journal
from qtool.convert.files.watch import watch, watch_blob
from qtool.evaluate import fidelity
from qtool.evaluate.journal import Journal
from qtool.evaluate.sandbox import secrets
from qtool.evaluate.scorecard import FidelityScore, ProblemOutcome, Settings
from qtool.runs import ledger

SETTINGS = Settings(engine="reference", dtype="float32", device="cpu", prompt="completion", max_new_tokens=4)
SCORE = FidelityScore(
    key="k", subject="s", digest="d", settings=SETTINGS, tokens=4, nll=[1.0], kl=[0.5], top1=[1.0], kl_p95=1, kl_p999=1
)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "x").touch()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "garbage": lambda p: p.write_bytes(b"\xff\x00garbage"),
    "a list": lambda p: p.write_text("[]"),
    "deep": lambda p: p.write_text("[" * 100_000),
    "another type": lambda p: p.write_text(p.read_text().replace("0.5", '"much"')),
    "no windows": lambda p: p.write_text(p.read_text().replace("0.5", "")),
    "another key": lambda p: p.write_text(p.read_text().replace('"k"', '"other"')),
    "a folder": as_folder,
    "a pipe": as_pipe,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_score_is_named_set_aside_and_made_again(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scores" / "fidelity-k.json"
    durable.save(path, SCORE)
    assert durable.load(FidelityScore, path) == SCORE
    DAMAGE[how](path)
    assert durable.load(FidelityScore, path, lambda s: "" if s.key == "k" else "it is of another key") is None
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: damaged (")
    assert said.count("\n") == 1
    assert [p.name for p in path.parent.iterdir()] == ["fidelity-k.json.damaged"]
    durable.save(path, SCORE)
    DAMAGE[how](path)  # a second time: what was set aside first stays
    assert durable.load(FidelityScore, path, lambda s: "" if s.key == "k" else "it is of another key") is None
    assert len(list(path.parent.iterdir())) == 2
    assert durable.load(FidelityScore, path) is None


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    durable.write_whole(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QtoolError, match=rf"{path}: No space left on device") as error:
        durable.write_whole(path, "new")
    assert error.value.exit_code == 3
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_dead_left_is_swept_and_what_the_living_write_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = (
        "import os; from qtool.convert.files import durable as d; print(d.work_folder('qtool-cell-')[0]); os._exit(1)"
    )
    dead = Path(subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"TMPDIR": str(tmp_path)},
        check=False,
    ).stdout.strip())  # fmt: skip
    (dead / "inside").mkdir()
    living, hold = durable.work_folder("qtool-cell-")
    assert not dead.exists()
    stranger = tmp_path / "qtool-cell-notes"
    stranger.mkdir()
    with durable.working_folder("qtool-cell-") as other:
        assert Path(living).exists()
        assert Path(other).exists()
    assert sorted(tmp_path.iterdir()) == sorted([Path(living), stranger])
    os.close(hold)

    number = dead.name.split("-")[2]  # of a process that is gone
    half = tmp_path / f"score.json.{number}.0123abcd.partial"
    half.touch()
    (tmp_path / "mine.partial").touch()
    durable.sweep(tmp_path)
    assert not half.exists()
    assert (tmp_path / "mine.partial").exists()


def test_a_second_holder_waits(tmp_path: Path) -> None:
    lock, log = tmp_path / "a.lock", tmp_path / "log"
    program = f"""
from pathlib import Path
from qtool.convert.files.durable import held
with held(Path({str(lock)!r}), "waiting for it"):
    with open({str(log)!r}, "a") as file: file.write("second\\n")
"""
    with durable.held(lock, ""):
        second = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=os.environ)
        assert second.stderr is not None
        assert second.stderr.readline() == "waiting for it\n"
        with log.open("a") as file:
            file.write("first\n")
    assert second.wait(60) == 0
    second.stderr.close()
    assert log.read_text() == "first\nsecond\n"
    assert not lock.exists()


@pytest.mark.parametrize("how", ["missing", "empty", "half", "zeros", "a file"])
def test_a_damaged_reference_is_seen(how: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "reference"
    folder.mkdir()
    logs = torch.log_softmax(torch.randn(8, 16), -1)
    for window in range(2):
        save_file({"logprobs": logs}, folder / f"{window:05}-0000000.safetensors")
    reference, windows = fidelity.Reference(folder), torch.zeros(2, 8, dtype=torch.int64)
    assert reference.fault(windows) == ""
    assert "missing" in reference.fault(torch.zeros(3, 8, dtype=torch.int64))
    assert "another shape" in reference.fault(torch.zeros(2, 9, dtype=torch.int64))
    path = folder / "00001-0000000.safetensors"
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "zeros":
        path.write_bytes(data[:-300] + bytes(300))
    elif how == "a file":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(data[: len(data) // 2] if how == "half" else b"")
    assert path.name in reference.fault(windows)


def test_a_journal_keeps_what_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.journal.jsonl"
    steps = [{"layer": n, "records": {"q_proj": {"frobenius": 0.1}}} for n in range(3)]
    lines = [json.dumps(row) + "\n" for row in ({"key": "k"}, *steps)]
    for bad in ("\x00\x00\n", "[]\n", '{"layer": 2}\n', '{"layer": 1, "records": {"q_proj": {"frobenius": "x"}}}\n'):
        path.write_text(lines[0] + lines[1] + bad + lines[3])
        assert resume_journal(path, "k") == steps[:1]
        assert path.read_text() == lines[0] + lines[1]
        assert "damaged after layer 1" in capsys.readouterr().err
    path.write_text("".join(lines)[:-5])  # a torn line is no damage
    assert resume_journal(path, "k") == steps[:2]
    assert capsys.readouterr().err == ""
    assert resume_journal(path, "other") is None
    for first in ("", "\x00\n", '{"key": 3}\n', "[" * 9999 + "\n"):
        path.write_text(first + lines[1])
        assert resume_journal(path, "k") is None


def test_answers_in_damaged_lines_are_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "task.jsonl"
    journal = Journal.open(path)
    journal.answered(("a", 0), "text")
    journal.add([(("b", 0), ProblemOutcome(outcome="passed", detail="", completion="x"))])
    whole = path.read_bytes()
    path.write_bytes(whole + b'\n{"problem": "c", "sample": 0, "completion": 3}\n\n[]\n\n\xff\x00\n\n{"prob')
    again = Journal.open(path)
    assert again.texts == {("a", 0): "text"}
    assert list(again.judged) == [("b", 0)]
    assert f"{path}: 3 damaged lines" in capsys.readouterr().err
    path.unlink()
    path.mkdir()
    assert not Journal.open(path).texts
    assert path.with_name("task.jsonl.damaged").is_dir()


def test_a_ledger_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").mkdir()
    with pytest.raises(QtoolError, match=r"ledger\.jsonl: is a folder"):
        ledger.read(tmp_path)
    ledger.append(tmp_path, {"run": "a"})
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b'{"torn')
    ledger.append(tmp_path, {"run": "b"})
    assert [row["run"] for row in ledger.read(tmp_path)] == ["a", "b"]


def test_folders_that_cannot_be_written_are_refused_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable.require_writable(tmp_path / "not" / "yet", "--runs")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for name in ("file", "file/below", "x" * 5000, "a\0b"):
        with pytest.raises(QtoolError, match="--runs") as error:
            durable.require_writable(tmp_path / name, "--runs")
        assert error.value.exit_code == 2
        assert len(error.value.message) < 600

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QtoolError, match="No space left on device") as error:
        durable.require_writable(tmp_path, "output_dir:")
    assert error.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_changed_is_named_and_one_that_was_touched_is_not(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(100))
    seen = watch(path)
    seen.require_unchanged()
    os.utime(path, ns=(1, 1))
    seen.require_unchanged()  # the same bytes
    copy = tmp_path / "copy"
    copy.write_bytes(bytes(100))
    copy.rename(path)
    seen.require_unchanged()
    before = path.stat()
    path.write_bytes(bytes(99) + b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the time set back
    with pytest.raises(QtoolError, match=rf"{path}: changed while"):
        seen.require_unchanged()
    path.unlink()
    with pytest.raises(QtoolError, match="cannot be read any more"):
        seen.require_unchanged()


def test_a_file_of_the_hubs_cache_is_known_by_its_name(tmp_path: Path) -> None:
    import hashlib

    data = b"hello\n"
    names = (hashlib.sha256(data).hexdigest(), "ce013625030ba8dba906f756967f9e9ca394464a")  # `git hash-object`
    for name in names:
        (tmp_path / name).write_bytes(data)
        link = tmp_path / f"{name[:4]}.json"
        link.symlink_to(name)
        seen = watch_blob(link)
        os.utime(tmp_path / name)
        seen.require_unchanged()
        (tmp_path / name).write_bytes(b"hellO\n")
        with pytest.raises(QtoolError, match="changed while"):
            seen.require_unchanged()


SECRET = """
DATABASE_URL GITHUB_PAT MY_PASS NPM_AUTH DB_PASSWORD MYSQL_PWD PGPASSWORD AWS_SESSION_TOKEN AWS_PROFILE GH_PAT
GOOGLE_APPLICATION_CREDENTIALS REDIS_URI SENTRY_DSN SLACK_WEBHOOK STRIPE_SK APIKEY OPENAIAPIKEY
AZURE_ACCOUNTKEY NETRC SSH_AUTH_SOCK SUDO_ASKPASS JWT SESSION_COOKIE DOCKER_AUTH_CONFIG PIP_EXTRA_INDEX_URL
MONGODB_CONNECTION_STRING DBPWD GPG_PASSPHRASE VLLM_API_KEY HF_TOKEN PASS PASSWD SMTP_PW BASIC_AUTH
SIGNING_KEYS NPM_CONFIG__AUTH
"""
KEPT = """
PATH HOME LANG LC_ALL TMPDIR CUDA_VISIBLE_DEVICES CUDA_HOME HF_HOME HF_HUB_OFFLINE OMP_NUM_THREADS
PYTHONHASHSEED LD_LIBRARY_PATH VLLM_CPU_KVCACHE_SPACE TOKENIZERS_PARALLELISM XDG_CACHE_HOME TRITON_CACHE_DIR
NO_PROXY PWD
"""


def test_children_that_compute_get_what_they_need() -> None:
    environment = dict.fromkeys([*SECRET.split(), "SOMETHING_ELSE"], "planted") | {
        name: f"/x/{name}" for name in KEPT.split()
    }
    hidden = {"HTTPS_PROXY": "http://u:p@127.0.0.1", "HF_ENDPOINT": "https://u:p@hub", "HF_X": "hf_abcdefgh1234"}
    environment |= hidden | {"HTTP_PROXY": "http://proxy:3128", "PYTHONPATH": ":.:lib:/opt/lib"}
    child = secrets.for_child(environment)
    assert child.keys() == {*KEPT.split(), "HTTP_PROXY", "PYTHONPATH", "PYTHONSAFEPATH"}
    assert child["PYTHONPATH"] == "/opt/lib"
    assert not secrets.without_secrets(environment).keys() & {*SECRET.split(), *hidden}


def test_a_probe_that_was_killed_is_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"probe.{dead.pid}.01234567.partial").write_bytes(b"")
    require_writable(tmp_path / "runs", "--runs")
    assert list(tmp_path.iterdir()) == []
