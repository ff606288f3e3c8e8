"""The commands as a user types them: exit codes, messages, the log that stays."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qtool.cli import main


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Two problems that no random model solves."""
    rows = [
        {
            "task_id": f"t/{i}", "prompt": 'def f(x: int) -> int:\n    """Do it."""\n', "entry_point": "f",
            "canonical_solution": "    return x + 1000\n",
            "test": f"def check(candidate):\n    assert candidate({i}) == {i + 1000}\n",
        }
        for i in range(2)
    ]  # fmt: skip
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluation(problems: Path, text_file: Path) -> dict[str, object]:
    return {
        "tasks": [{"task": str(problems)}], "max_new_tokens": 8,
        "text": {"text": str(text_file), "samples": 6, "length": 48, "seed": 3},
    }  # fmt: skip


@pytest.mark.slow
def test_run_end_to_end(write_recipe: Callable[..., Path], problems: Path, text_file: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    recipe = write_recipe(evaluate=evaluation(problems, text_file), gates=[{"max_kld": 5.0}, {"max_size": 1.0}])
    result = call("run", recipe, "--runs", runs, "--profile", tmp_path / "trace.json")
    assert result.exit_code == 0, result.output
    for expected in ("source", "awq", " s: opening ", " resident", "KL to source", "pass  awq: max_kld 5", "report:"):
        assert expected in result.output
    (folder,) = (path for path in runs.iterdir() if (path / "lock.json").exists())
    lock = json.loads((folder / "lock.json").read_text())
    assert f"report: {folder / 'report.html'}" in result.output
    assert (folder / "report.html").read_text().count("<section") > 4
    checked = call("check", "latest", "--runs", runs)
    assert (checked.exit_code, "pass  awq: verified" in checked.output) == (0, True), checked.output
    assert lock["source"]["commit"].startswith("sha256:")
    assert (folder / "recipe.yaml").read_bytes() == recipe.read_bytes()
    scores = {path.name: json.loads(path.read_text()) for path in (folder / "scores").iterdir()}
    tasks = [score for score in scores.values() if "outcomes" in score]
    assert {score["subject"] for score in tasks} == {"source", "awq"}
    assert all(outcome["outcome"] == "failed" for score in tasks for outcome in score["outcomes"].values())
    assert tasks[0]["sandbox"] != "none"
    (entry,) = map(json.loads, (runs / "ledger.jsonl").read_text().splitlines())
    stages = {"opening", "tokenizing", "reading the source", "rounding", "packing", "writing", "sealing", "verifying"}
    stages |= {"self-check", "fidelity", "tasks"}
    assert set(entry["stages"]) == stages
    assert entry["peaks"]["resident"] > entry["peaks"]["anonymous"] > 2**26  # torch alone takes more
    assert json.loads((folder / "result.json").read_text())["stages"] == entry["stages"]
    assert "rounding" in (folder / "report.md").read_text()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "X"} == stages
    assert sum(e["dur"] for e in events if e["ph"] == "X") < 1e6 * entry["seconds"] + 1e5 * len(events)
    assert entry["scores"]["awq"] == {str(problems): 0.0}
    assert entry["kl"]["awq"] > 0 == entry["kl"]["source"]
    # a gate edited afterwards judges what is there: nothing is made or measured again
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "artifacts").rglob("*")}
    strict = write_recipe(evaluate=evaluation(problems, text_file), gates=[{"max_kld": 1e-6}])
    result = call("run", strict, "--runs", runs)
    assert result.exit_code == 1
    assert "FAIL" in result.output
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "artifacts").rglob("*")}
    assert len((runs / "ledger.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_undecided_fails_only_where_the_gate_says_so(
    write_recipe: Callable[..., Path], problems: Path, text_file: Path, tmp_path: Path
) -> None:
    """Two problems decide nothing."""
    for on_undecided, code in (("warn", 0), ("fail", 1)):
        gate = {"max_drop": 1, "on_undecided": on_undecided}
        recipe = write_recipe(evaluate=evaluation(problems, text_file), gates=[gate])
        result = call("run", recipe, "--runs", tmp_path / "runs")
        assert result.exit_code == code, result.output
        assert "undecided" in result.output


def test_dry_run_reads_no_weight_and_writes_nothing(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    short = call("run", write_recipe(), "--dry-run")
    result = call("run", write_recipe(), "--dry-run", "--full")
    assert (short.exit_code, result.exit_code) == (0, 0), result.output
    assert ("self_attn.q_proj" in short.output, "self_attn.q_proj" in result.output) == (False, True)
    assert "bits a weight" in short.output
    assert "host memory: about " in short.output
    assert "this job fits" in short.output
    assert not (tmp_path / "artifacts").exists()


def test_input_errors_exit_2(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    assert call("run", tmp_path / "absent.yaml").exit_code == 2
    result = call("run", write_recipe(), "--only", "gguf")
    assert result.exit_code == 2
    assert "--only gguf: the recipe's outputs are awq" in result.output
    assert call("verify", tmp_path).exit_code == 2
    assert call("evaluate", tmp_path).exit_code == 2
    result = call("run", write_recipe(), "--device", "cuda", "--dry-run")
    assert result.exit_code in (0, 3)


def test_only_one_output(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    outputs = [
        {"method": "awq", "group_size": 32},
        {"method": "awq", "name": "rtn", "group_size": 32, "scaling": "none"},
    ]
    result = call("run", write_recipe(outputs=outputs), "--only", "rtn", "--runs", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == ["tiny-rtn"]


@pytest.mark.slow
def test_verify_and_evaluate_commands(
    write_recipe: Callable[..., Path], tiny: Path, tmp_path: Path, text_file: Path
) -> None:
    assert call("run", write_recipe(), "--runs", tmp_path / "runs").exit_code == 0
    artifact = tmp_path / "artifacts" / "tiny-awq"
    result = call("verify", artifact, "--source", tiny)
    assert result.exit_code == 0
    assert "sound" in result.output
    result = call(
        "evaluate",
        artifact,
        "--source",
        tiny,
        "--text",
        text_file,
        "--windows",
        4,
        "--window-length",
        64,
        "--runs",
        tmp_path / "runs",
    )
    assert result.exit_code == 0, result.output
    assert "tiny-awq" in result.output
    (artifact / "model.safetensors").write_bytes(b"")
    result = call("verify", artifact)  # not even a safetensors file: the artifact is not sound, and made again
    assert (result.exit_code, "make it again" in result.output) == (1, True), result.output
    (artifact / "tokenizer.json").unlink()


@pytest.mark.parametrize("command", [[], ["run"], ["verify"], ["evaluate"]])
def test_help_shows_examples(command: list[str]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert "qtool " in result.output


def test_help_imports_nothing_heavy() -> None:
    """`qtool --help` must be quick: torch alone takes seconds."""
    heavy = ("torch", "transformers", "pydantic")
    code = f"import sys; from qtool.cli import main; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_python_m_qtool() -> None:
    done = subprocess.run([sys.executable, "-m", "qtool", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("qtool, version")
