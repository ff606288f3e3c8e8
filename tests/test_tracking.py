"""Runs in MLflow, Weights & Biases and trackio: what is logged is read back by each tool's own reader. The tools are in
no environment of the suite; these tests skip without them."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from qtool import QtoolError
from qtool.cli import main
from qtool.report.files import write_report
from qtool.runs.record import RunRecord
from qtool.share.tracking import TRACKERS, metrics_of, track, tracked


@pytest.fixture
def report(finished: RunRecord, tmp_path: Path) -> Path:
    return write_report(finished, tmp_path / "report")


def test_metrics_are_the_summary_with_the_ends_of_each_interval(finished: RunRecord, report: Path) -> None:
    found = tracked(finished, "p", report)
    assert [one.name for one in found] == [f"{finished.lock.source.name}-{name}" for name in finished.summary.models]
    assert {one.group for one in found} == {finished.folder.name}
    model = finished.summary.models["awq"]
    metrics = metrics_of(model)
    assert model.size is not None
    assert metrics["size_bytes"] == model.size.tensors
    for task, score in model.tasks.items():
        assert score.loss is not None
        label = Path(task).name
        ends = (score.rate.low, score.rate.estimate, score.rate.high)
        assert (metrics[f"{label}.low"], metrics[label], metrics[f"{label}.high"]) == ends
        assert metrics[f"{label}.points_lost"] == score.loss.difference.loss.estimate
    assert model.text is not None
    assert (metrics["kl.low"], metrics["kl.high"]) == (model.text.kl.low, model.text.kl.high)
    (awq,) = [one for one in found if one.name.endswith("-awq")]
    assert awq.parameters["method"] == "awq"
    assert awq.parameters["commit"] == finished.lock.source.commit


def test_names_and_numbers_are_such_as_every_tool_takes(finished: RunRecord) -> None:
    model = finished.summary.models["awq"]
    score = next(iter(model.tasks.values()))
    assert model.text is not None
    odd = model.model_copy(update={"tasks": {"folder/human eval+ (x)": score}, "texts": {96: model.text}})
    metrics = metrics_of(odd)
    assert "human eval_ _x_" in metrics
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_package_that_is_missing_is_named(finished: RunRecord, report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in TRACKERS:
        monkeypatch.setitem(__import__("sys").modules, tool, None)
        with pytest.raises(QtoolError, match=f"pip install {tool}") as refused:
            track(finished, tool, "p", report)
        assert refused.value.exit_code == 3


def test_mlflow_has_scores_settings_and_the_report(
    finished: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    store = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    result = CliRunner().invoke(main, ["track", str(finished.folder), "--to", "mlflow", "--project", "demo"])
    assert result.exit_code == 0, result.output
    client = mlflow.MlflowClient(tracking_uri=store)
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    for name, model in finished.summary.models.items():
        run = by_name[f"{finished.lock.source.name}-{name}"]
        assert run.data.metrics == pytest.approx(metrics_of(model))
        assert run.data.tags["qtool.run"] == finished.folder.name
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.html"]
    assert by_name[f"{finished.lock.source.name}-awq"].data.params["method"] == "awq"


def test_wandb_is_offline(finished: RunRecord, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    places = track(finished, "wandb", "demo", report)
    assert len(places) == len(finished.summary.models)
    for (_, place), model in zip(places, finished.summary.models.values(), strict=True):
        assert "offline-run" in place
        (file,) = Path(place).parent.glob("*.wandb")
        wanted = [
            part for name, value in metrics_of(model).items() for part in (name, json.dumps(value).removesuffix(".0"))
        ]
        wanted.append(f"report-{finished.folder.name}")
        end = time.monotonic() + 20  # its own process writes the records, whose numbers are JSON
        while (
            missing := [part for part in wanted if part.encode() not in file.read_bytes()]
        ) and time.monotonic() < end:
            time.sleep(0.2)
        assert missing == []


def test_trackio_is_local(finished: RunRecord, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    track(finished, "trackio", "demo", report)
    runs = {run.name: run for run in trackio.Api().runs("demo")}
    assert len(runs) == len(finished.summary.models)
