"""Logs of lm-eval 0.4.13 and inspect_ai 0.3.285, as they wrote them (data/logs; of inspect_ai's the events are left
out): read as scores, paired, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qtool import QtoolError
from qtool.cli import main
from qtool.runs.foreign import is_log, load_log
from qtool.runs.sides import resolve_side

LOGS = Path(__file__).parent / "data" / "logs"
FOLDER = LOGS / "lm-eval" / "dummy"
(SAMPLES,) = FOLDER.glob("samples_*.jsonl")


def edited_rows(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    rows = [json.loads(line) for line in SAMPLES.read_text().splitlines()]
    for row in rows:
        change(row)
    path.mkdir(parents=True)
    (path / SAMPLES.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def edited_log(path: Path, change: Callable[[dict[str, Any]], object], name: str = "inspect-1.json") -> Path:
    log = json.loads((LOGS / name).read_text())
    change(log)
    path.write_text(json.dumps(log))
    return path


@pytest.mark.parametrize("path", [FOLDER, SAMPLES])
def test_lm_eval_says_what_was_right(path: Path) -> None:
    assert is_log(path)
    (model, measured), = load_log(path).subjects.items()  # fmt: skip
    assert model == "dummy"
    (label, task), = measured.tasks.items()  # fmt: skip
    assert label == "tiny_code"
    assert task.solved == {"t/0": 1, "t/1": 0, "t/2": 1}  # exact_match 0.6667, as lm-eval printed
    assert (task.samples, task.settings.max_new_tokens, task.settings.temperature) == (1, 16, 0.0)


def test_inspect_says_what_was_right() -> None:
    for name, times in (("inspect-1.json", 1), ("inspect-2.json", 2)):
        assert is_log(LOGS / name)
        (model, measured), = load_log(LOGS / name).subjects.items()  # fmt: skip
        assert model == "mockllm/model"
        assert measured.tasks["tiny"].samples == times
        assert measured.tasks["tiny"].solved == {"t/0": times, "t/1": 0, "t/2": times}  # accuracy 0.667


def test_repeats_and_filters(tmp_path: Path) -> None:
    """Of four answers the share that was right; each filter is a task of its own."""

    def four(row: dict[str, Any]) -> None:
        row["resps"] = [["a"] * 4]
        row["exact_match"] = 0.75 if row["doc_id"] else 0.0

    (task,) = load_log(edited_rows(tmp_path / "four", four)).subjects["four"].tasks.values()
    assert (task.samples, task.solved) == (4, {"t/0": 0, "t/1": 3, "t/2": 3})
    both = edited_rows(tmp_path / "both", lambda row: None)
    loose = SAMPLES.read_text().replace('"filter": "none"', '"filter": "loose"')
    (both / SAMPLES.name).write_text(SAMPLES.read_text() + loose)
    assert list(load_log(both).subjects["both"].tasks) == ["tiny_code, none", "tiny_code, loose"]


def test_two_models_are_paired_whatever_their_names(tmp_path: Path) -> None:
    other = edited_rows(tmp_path / "other", lambda row: row.update(exact_match=0.0))
    result = CliRunner(env={"COLUMNS": "120"}).invoke(main, ["compare", str(FOLDER), str(other)])
    assert result.exit_code == 0, result.output  # 2 of 3 is too little to show a loss
    assert "dummy -> other" in result.output
    assert "tiny_code" in result.output
    changed = edited_log(tmp_path / "b.json", lambda log: log["eval"].update(model="b"))
    result = CliRunner(env={"COLUMNS": "120"}).invoke(main, ["compare", str(LOGS / "inspect-1.json"), str(changed)])
    assert (result.exit_code, "mockllm/model -> b" in result.output) == (0, True), result.output


def test_a_loss_is_shown(tmp_path: Path) -> None:
    def many(right: bool) -> Path:
        rows = [json.loads(SAMPLES.read_text().splitlines()[0]) for _ in range(40)]
        for number, row in enumerate(rows):
            row.update(doc_id=number, doc={}, exact_match=float(right or number >= 12))
        folder = tmp_path / ("a" if right else "b")
        folder.mkdir()
        (folder / SAMPLES.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    a, b = many(True), many(False)
    result = CliRunner(env={"COLUMNS": "120"}).invoke(main, ["compare", str(a), str(b)])
    assert (result.exit_code, "worse" in result.output) == (1, True), result.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda log: log.update(status="error"), "ended with status 'error'"),
        (
            lambda log: log["samples"][1]["scores"]["includes"].update(value="P"),
            "t/1: includes says 'P', neither right",
        ),
        (lambda log: log.update(samples=[]), "holds no scored samples"),
    ],
)
def test_a_log_that_tells_no_right_or_wrong_is_refused(
    change: Callable[[dict[str, Any]], object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(QtoolError, match=said):
        load_log(edited_log(tmp_path / "log.json", change))


def test_what_must_not_be_paired_is_refused(tmp_path: Path) -> None:
    other = edited_rows(tmp_path / "other", lambda row: row.update(prompt_hash="another prompt"))
    epochs, once = LOGS / "inspect-2.json", LOGS / "inspect-1.json"
    for a, b, said in ((FOLDER, other, "other problems"), (once, epochs, "samples 1 and 2")):
        result = CliRunner().invoke(main, ["compare", str(a), str(b)])
        assert result.exit_code == 2
        assert said in result.output
    result = CliRunner().invoke(main, ["compare", str(FOLDER), str(once)])
    assert "only A was asked" in result.output  # of other tasks nothing is paired


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "x.eval").write_bytes(b"PK")
    with pytest.raises(QtoolError, match=r"x\.jsonl:1: no row of lm-eval's --log_samples"):
        resolve_side(str(tmp_path / "x.jsonl"), tmp_path)
    with pytest.raises(QtoolError, match=r"inspect log convert .*x\.eval --to json"):
        resolve_side(str(tmp_path / "x.eval"), tmp_path)
    fractions = edited_rows(tmp_path / "f", lambda row: row.update(exact_match=0.3))
    with pytest.raises(QtoolError, match=r"none of its metrics \(exact_match\) says right or wrong"):
        load_log(fractions)
    assert not is_log(tmp_path)
    shutil.copy(Path(__file__).parent / "data" / "stored_run" / "00265698" / "scores.json", tmp_path / "scores.json")
    assert not is_log(tmp_path / "scores.json")
