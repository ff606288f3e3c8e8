"""compare, check and baseline: a planted regression is caught, an identical artifact is not, what does not pair is
refused; gates say pass, fail or undecided and never nothing."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from qtool.cli import main
from qtool.convert.artifact import Artifact
from qtool.convert.files.source import resolve
from qtool.evaluate.scorecard import FidelityScore, Scores, save
from qtool.measure.scores import Evaluation
from qtool.measure.scoring import evaluate_folders
from qtool.measure.subjects import Subject, artifact_subject
from qtool.recipe.judging import EvaluateSection, FidelitySection, GateSection, TaskSection
from qtool.report.junit import as_junit
from qtool.run import run
from qtool.runs.gates import GateResult, judge
from qtool.runs.record import RunRecord, load_run, write_scores
from qtool.runs.summary import summarise


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(main, [str(argument) for argument in arguments])


def two_bits(weight: torch.Tensor) -> torch.Tensor:
    """Each row rounded to four levels."""
    low, high = weight.float().aminmax(dim=1, keepdim=True)
    step = (high - low) / 3
    return ((weight.float() - low) / step).round() * step + low


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model judged by hand in runs of one recipe: as AWQ, the same again, and with layers of two bits."""
    from qtool.convert.files.checkpoint import Checkpoint
    from qtool.convert.skeleton import load_config
    from qtool.make.progress import progress_bar

    folder = tmp_path_factory.mktemp("planted")
    recipe = {
        "model": "qtool-demo", "calibration": {"text": "qtool-code", "samples": 8, "length": 128},
        "outputs": [{"method": "awq", "group_size": 64}], "output_dir": str(folder / "artifacts"),
        "evaluate": {
            "tasks": [{"task": "heldout", "limit": 24}], "max_new_tokens": 96, "batch_size": 24,
            "text": {"text": "heldout-code", "samples": 8, "length": 128},
        },
        "gates": [{"max_kld": 0.2}, {"min_bits_saved": 8}, {"task": "heldout", "max_drop": 20}],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    good = run(folder / "recipe.yaml", folder / "runs", "cpu")
    found = {"good": good.folder, "runs": folder / "runs", "artifact": good.folders["awq"]}
    source = resolve("qtool-demo")
    section = EvaluateSection(
        tasks=(TaskSection(task="heldout", limit=24),), max_new_tokens=96, batch_size=24,
        text=FidelitySection(text="heldout-code", samples=8, length=128),
    )  # fmt: skip

    def broken(prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in Artifact.open(good.folders["awq"]).read(prefix):
            yield name, two_bits(tensor) if ".layers.1." in name and name.endswith("_proj.weight") else tensor

    for label, stream in (("same", Artifact.open(good.folders["awq"]).read), ("bad", broken)):
        target = folder / "runs" / label
        shutil.copytree(good.folder, target, ignore=shutil.ignore_patterns("scores"))
        subjects = [
            Subject("source", good.lock.source.commit, Checkpoint.open(source.path).read),
            Subject("awq", f"planted-{label}", stream),
        ]
        config, cpu = load_config(source.path), torch.device("cpu")
        evaluation = Evaluation(section, source.path, config, cpu, folder / "runs", target)
        with progress_bar() as bar:
            scores = evaluation.score(subjects, bar)
        write_scores(target, {subject.name: subject.key for subject in subjects}, scores)
        found[label] = target
    return found


def test_a_planted_regression_is_caught(planted: dict[str, Path]) -> None:
    result = call("compare", planted["good"], planted["bad"])
    assert result.exit_code == 1, result.output
    assert "B is worse: awq on heldout, awq on KL to source" in result.output
    assert "source on" not in result.output
    back = call("compare", planted["bad"], planted["good"])
    assert back.exit_code == 0, back.output
    assert "better" in back.output


def test_an_identical_artifact_is_not(planted: dict[str, Path]) -> None:
    result = call("compare", planted["good"], planted["same"])
    assert result.exit_code == 0, result.output
    assert "No loss from A to B is shown." in result.output
    assert "would show" in result.output  # and how much could have been lost unseen
    assert "p is Holm-adjusted over 2 tests" in result.output


def test_artifacts_are_found_by_what_they_are(planted: dict[str, Path]) -> None:
    result = call("compare", planted["artifact"], f"{planted['good']}:source", "--runs", planted["runs"])
    assert result.exit_code == 0, result.output
    assert "awq -> source" in result.output
    loss = call("compare", f"{planted['good'].name[:5]}:source", planted["artifact"], "--runs", planted["runs"])
    assert loss.exit_code == 1  # the KL to the source is above 0, and shown to be
    assert "source -> awq" in loss.output
    stranger = call("compare", planted["artifact"], planted["artifact"], "--runs", planted["runs"] / "none")
    assert stranger.exit_code == 2
    assert "has no scores of this artifact" in stranger.output
    wrong = call("compare", f"{planted['good']}:gptq", planted["bad"])
    assert (wrong.exit_code, "no model 'gptq' there; it has source, awq" in wrong.output) == (2, True)


def test_check_against_a_baseline(planted: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    assert call("baseline", "save", planted["good"], file).exit_code == 0
    assert file.stat().st_size < 20_000
    assert "return" not in file.read_text()  # no answers
    fine = call("check", planted["same"], "--baseline", file)
    assert fine.exit_code == 0, fine.output
    junit, data = tmp_path / "q.xml", tmp_path / "q.json"
    caught = call("check", planted["bad"], "--baseline", file, "--junit", junit, "--json", data)
    assert caught.exit_code == 1
    assert "FAIL  awq: no regression: heldout: worse than the baseline" in caught.output
    results = json.loads(data.read_text())["results"]
    failed = {(r["output"], r["gate"]) for r in results if r["failed"]}
    assert {("awq", "no regression: heldout"), ("awq", "no regression: KL to source")} <= failed
    assert not [r for r in results if r["output"] == "source" and r["failed"]]
    suites = ET.parse(junit).getroot()
    assert suites.tag == "testsuites"
    (suite,) = suites
    cases = suite.findall("testcase")
    assert suite.get("tests") == str(len(cases)) == str(len(results))
    assert suite.get("failures") == str(len(failed)) == str(len(suite.findall("testcase/failure")))
    assert call("compare", file, f"{planted['bad']}:awq").exit_code == 1


def test_what_the_baseline_has_must_be_measured(planted: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    call("baseline", "save", planted["good"], file)
    data = json.loads(file.read_text())
    data["subjects"]["gptq"] = data["subjects"]["awq"]
    data["subjects"]["awq"]["tasks"]["more"] = data["subjects"]["awq"]["tasks"]["heldout"]
    file.write_text(json.dumps(data))
    result = call("check", planted["good"], "--baseline", file)
    assert result.exit_code == 1
    assert "FAIL  gptq: in the baseline: this run did not make it" in result.output
    assert "FAIL  awq: no regression: more: not compared: only A was asked" in result.output


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("tasks", "heldout", "settings", "engine"), "llama.cpp", "awq: heldout: engine llama.cpp and reference"),
        (("tasks", "heldout", "settings", "dtype"), "bfloat16", "awq: heldout: dtype bfloat16 and float32"),
        (("tasks", "heldout", "settings", "prompt"), "chat", "awq: heldout: prompt chat and completion"),
        (("tasks", "heldout", "digest"), "0", r"awq: heldout: other problems \(24 and 24\)"),
        (("tasks", "heldout", "samples"), 2, "awq: heldout: samples 2 and 1"),
        (("texts", "128", "digest"), "0", "awq: held-out text: other windows of text"),
        (("texts", "128", "settings", "dtype"), "bfloat16", "awq: held-out text: dtype bfloat16 and float32"),
    ],
)
def test_what_does_not_pair_is_refused(
    planted: dict[str, Path], tmp_path: Path, path: tuple[str, ...], value: object, message: str
) -> None:
    import re

    file = tmp_path / "baseline.json"
    call("baseline", "save", planted["good"], file)
    data = json.loads(file.read_text())
    place: Any = data["subjects"]["awq"]
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    file.write_text(json.dumps(data))
    for result in (call("compare", file, planted["good"]), call("check", planted["good"], "--baseline", file)):
        assert result.exit_code == 2, result.output
        assert re.search(message, result.output)


def test_other_sources_have_no_common_kl(planted: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    call("baseline", "save", planted["good"], file)
    file.write_text(file.read_text().replace('"source":"sha256:', '"source":"sha256:other'))
    result = call("compare", file, f"{planted['bad']}:awq")
    assert "the sources differ" in result.output
    assert result.exit_code == 1  # by perplexity and by the task
    assert "B is worse: awq on heldout, awq on perplexity" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "nothing"), "no such run"),
        (("compare", "absent.json", "x"), "absent.json: no such file"),
        (("baseline", "save", "nothing", "x.json"), "no such run"),
    ],
)
def test_names_of_nothing(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = call(*arguments, "--runs", tmp_path)
    assert result.exit_code == 2
    assert message in result.output


def test_broken_baselines_are_refused(planted: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"run": 1}')
    result = call("check", planted["good"], "--baseline", tmp_path / "b.json")
    assert (result.exit_code, "not a baseline" in result.output) == (2, True)


def test_check_judges_by_another_recipes_gates(planted: dict[str, Path], write_recipe: Callable[..., Path]) -> None:
    strict = write_recipe(gates=[{"max_kld": 1e-6}, {"max_size": 1e-5}, {"min_bits_saved": 15}])
    result = call("check", planted["good"], "--recipe", strict)
    assert result.exit_code == 1
    assert result.output.count("FAIL") == 3


def test_a_broken_artifact_fails_the_check(planted: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(planted["good"], folder)
    data = json.loads((folder / "result.json").read_text())
    data["checks"]["awq"][0] |= {"status": "fail", "detail": "model.safetensors has changed"}
    (folder / "result.json").write_text(json.dumps(data))
    result = call("check", folder)
    assert result.exit_code == 1
    assert "FAIL  awq: verified: files and sha256: model.safetensors has changed" in result.output


def gate_of(record: RunRecord, scores: Scores | None = None, **gate: Any) -> GateResult:
    sizes = {name: model.size for name, model in record.summary.models.items() if model.size}
    (result,) = judge(record.summary if scores is None else summarise(scores, sizes), [GateSection(**gate)])
    return result


@pytest.mark.parametrize(
    ("gate", "verdict", "reason"),
    [
        ({"max_size": 1.0}, "pass", "at most max_size"),
        ({"max_size": 1e-6}, "fail", "above max_size"),
        ({"min_bits_saved": 8}, "pass", "bpw saved is at least 8"),
        ({"min_bits_saved": 15}, "fail", "bpw saved is below 15"),
        ({"max_kld": 1.0}, "pass", "within max_kld 1"),
        ({"max_kld": 1e-5}, "fail", "beyond max_kld"),
        ({"max_drop": 60, "task": "heldout"}, "pass", "within max_drop 60"),
        ({"max_drop": 0, "task": "heldout"}, "undecided", "24 problems show losses from"),
        ({"min_recovery": 0.3}, "pass", "within min_recovery 0.3"),
        ({"min_recovery": 1.5}, "fail", "beyond min_recovery 1.5"),
        ({"max_drop": 5, "output": "gptq"}, "undecided", "did not make that output"),
        ({"max_size": 5, "output": "gptq"}, "undecided", "did not make that output"),
        ({"max_drop": 5, "task": "humaneval"}, "undecided", "the source has no score on humaneval"),
    ],
)
def test_gates(planted: dict[str, Path], gate: dict[str, Any], verdict: str, reason: str) -> None:
    result = gate_of(load_run(planted["good"]), **gate)
    assert result.verdict == verdict
    assert reason in result.reason
    assert result.failed == (verdict == "fail")
    assert gate_of(load_run(planted["good"]), **gate, on_undecided="fail").failed == (verdict != "pass")


def test_gates_without_a_measurement_are_undecided(planted: dict[str, Path]) -> None:
    record = load_run(planted["good"])
    assert "no KL was measured" in gate_of(record, Scores(), max_kld=1).reason
    assert "no task was run" in gate_of(record, Scores(), max_drop=1).reason
    broken = Scores(fidelity={"awq": record.scores.fidelity["awq"].model_copy(update={"kl": [float("nan")]})})
    assert gate_of(record, broken, max_kld=1).verdict == "fail"


def test_a_model_without_numbers_is_worse(planted: dict[str, Path], tmp_path: Path) -> None:
    """NaN survives the score file, the baseline and the report, and is never equal to a number."""
    folder = tmp_path / "nan"
    shutil.copytree(planted["good"], folder)
    key = json.loads((folder / "scores.json").read_text())["fidelity"]["awq"]
    (file,) = (folder / "scores").glob(f"*{key[:16]}.json")
    score = FidelityScore.model_validate_json(file.read_text())
    nothing = [float("nan")] * len(score.kl)
    save(file, score.model_copy(update={"kl": nothing, "nll": nothing, "kl_by_position": nothing}))
    result = call("compare", planted["good"], folder)
    assert (result.exit_code, "B is worse: awq on held-out text" in result.output) == (1, True), result.output
    assert "not a number" in call("check", folder).output
    assert call("report", folder).exit_code == 0
    assert "not a number" in (folder / "report.html").read_text()
    assert call("baseline", "save", folder, tmp_path / "b.json").exit_code == 0
    assert call("compare", tmp_path / "b.json", planted["good"]).exit_code == 0
    result = call("check", planted["good"], "--baseline", tmp_path / "b.json")  # the broken one was the baseline
    assert "better than the baseline: not a number in A" in " ".join(result.output.split()), result.output
    assert result.exit_code == 0


@pytest.mark.slow
def test_scores_are_of_these_files_against_this_source(planted: dict[str, Path], tmp_path: Path) -> None:
    """Another source, other weights at the same place, another template: nothing measured before is taken for it."""
    foreign = tmp_path / "foreign"
    shutil.copytree(planted["artifact"], foreign)
    (foreign / "qtool.json").unlink()

    def evaluated(source: Path | None, task: str | None = None) -> Scores:
        text = FidelitySection(text="heldout-code", samples=2, length=64) if task is None else None
        tasks = (TaskSection(task=task, limit=1),) if task else ()
        section = EvaluateSection(tasks=tasks, text=text, max_new_tokens=8, batch_size=4, prompt="chat")
        return evaluate_folders(foreign, source, section, tmp_path / "runs", "cpu", False)

    assert max(evaluated(None).fidelity["source"].kl) < 1e-6  # alone, it is its own source
    first = evaluated(resolve("qtool-demo").path).fidelity["foreign"]
    assert min(first.kl) > 1e-3
    (shard,) = foreign.glob("*.safetensors")
    tensors = load_file(shard)
    save_file(tensors | {"model.norm.weight": 2 * tensors["model.norm.weight"]}, shard, {"format": "pt"})
    assert evaluated(resolve("qtool-demo").path).fidelity["foreign"].kl != first.kl

    keys = set()
    for greeting in ("hello", "goodbye"):
        (foreign / "chat_template.jinja").write_text(f"{greeting} {{{{ messages[0].content }}}}")
        keys.add(evaluated(None, "handwritten").tasks["foreign"]["handwritten"].key)
    assert len(keys) == 2


def test_gates_judge_the_first_length_whichever_was_known_before(tmp_path: Path) -> None:
    """An earlier run had the second length; it does not become the first."""
    for samples, lengths in ((1, (64,)), (2, (32, 64))):  # two windows of 32 are as much text as one of 64
        section = EvaluateSection(text=FidelitySection(text="heldout-code", samples=samples, length=lengths))
        scores = evaluate_folders(Path("qtool-demo"), None, section, tmp_path / "runs", "cpu", False)
        assert list(scores.contexts["source"]) == list(lengths)
        assert scores.fidelity["source"].context == lengths[0]


def test_another_tools_folder_is_found_by_what_is_in_it(planted: dict[str, Path], tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(planted["artifact"], foreign)
    (foreign / "qtool.json").unlink()
    runs = tmp_path / "runs"
    shutil.copytree(planted["bad"], runs / "x")
    index = json.loads((runs / "x" / "scores.json").read_text())
    index["subjects"]["awq"] = artifact_subject("foreign", Artifact.open(foreign)).key
    (runs / "x" / "scores.json").write_text(json.dumps(index))
    result = call("compare", f"{planted['good']}:awq", foreign, "--runs", runs)
    assert (result.exit_code, "B is worse" in result.output) == (1, True), result.output


def test_junit_holds_any_text(planted: dict[str, Path]) -> None:
    reason = "\x00\x1b]]>&<\"'\ud800\uffff é"
    results = [
        GateResult("awq", "max_kld", "fail", reason, "warn"),
        GateResult("awq", "max_drop", "undecided", reason, "warn"),
        GateResult("awq", "max_drop", "undecided", reason, "fail"),
        GateResult("awq", "max_size", "pass", reason, "warn"),
    ]
    (suite,) = ET.fromstring(as_junit(load_run(planted["good"]), results).encode())
    assert [[child.tag for child in case] for case in suite] == [["failure"], ["skipped"], ["failure"], ["system-out"]]
    assert (suite.get("failures"), suite.get("skipped"), suite.get("tests")) == ("2", "1", "4")
    assert suite[0][0].get("message") == "\\u0000\\u001b]]>&<\"'\\ud800\\uffff é"


@pytest.mark.parametrize("command", [["compare"], ["check"], ["baseline"], ["baseline", "save"], ["report"]])
def test_help_shows_examples(command: list[str]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.output
