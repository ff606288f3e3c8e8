"""The Summary: its numbers are those of a run stored before there was one; it is kept, found, and made anew where
it must be."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qtool import QtoolError
from qtool.cli import main
from qtool.evaluate.scorecard import FidelityScore, Scores
from qtool.evaluate.statistics import Interval
from qtool.recipe.judging import GateSection
from qtool.report.pictures import cost_lines
from qtool.report.tables import footnote, score_rows
from qtool.runs import ledger, summary
from qtool.runs.baseline import measured
from qtool.runs.gates import judge
from qtool.runs.measurements import Measurement
from qtool.runs.record import load_run, load_summary
from qtool.runs.summary import Size, Summary, save_summary, stored_summary, summarise

STORED = Path(__file__).parent / "data/stored_run/00265698"  # written before summary.json, answers left out
Numbers = tuple[float, ...]
# As the code before summary.py computed them, to the last bit.
RATES: dict[tuple[str, str], Numbers] = {
    ("source", "heldout"): (0.9833333333333333, 0.941264037027841, 0.9954174354340789),
    ("source", "sampled"): (0.7958333333333334, 0.6846153846153846, 0.8461538461538461),
    ("awq", "heldout"): (0.9666666666666667, 0.917419662440894, 0.9869624489016494),
    ("awq", "sampled"): (0.6958333333333333, 0.596153846153846, 0.7576923076923077),
    ("rtn", "heldout"): (0.9666666666666667, 0.917419662440894, 0.9869624489016494),
    ("rtn", "sampled"): (0.41250000000000003, 0.34615384615384615, 0.49615384615384617),
}
# loss, low, high, lost, gained, problems, detectable, p, p after Holm over 4; recovery, low, high
LOSSES: dict[tuple[str, str], tuple[Numbers, Numbers]] = {
    ("awq", "heldout"): (
        (1.6666666666666667, -1.9307632383082836, 6.085550505496308, 2, 0, 120, 6.413258655757667, 0.5, 1.0),
        (0.9830508474576272, 0.9381130457068172, 1.0196348803895758),
    ),
    ("awq", "sampled"): (
        (10.0, -3.4615384615384617, 21.53846153846154, 13, 7, 24, 17.96108979092856, 0.018533706665039062,
         0.05560111999511719),
        (0.8743455497382199, 0.7293596455900121, 1.0434957712444624),
    ),
    ("rtn", "heldout"): (
        (1.6666666666666667, -1.9307632383082836, 6.085550505496308, 2, 0, 120, 6.413258655757667, 0.5, 1.0),
        (0.9830508474576272, 0.9381130457068172, 1.0196348803895758),
    ),
    ("rtn", "sampled"): (
        (38.33333333333333, 20.76923076923077, 47.307692307692314, 23, 0, 24, 18.98604001919034,
         2.384185791015625e-07, 9.5367431640625e-07),
        (0.5183246073298431, 0.40555779299234795, 0.739025372533226),
    ),
}  # fmt: skip
# KL, low, high, perplexity, top-1
TEXTS: dict[tuple[str, int], Numbers] = {
    ("source", 256): (0.0, 0.0, 0.0, 2.322100300921443, 1.0),
    ("source", 512): (0.0, 0.0, 0.0, 2.4106041018850655, 1.0),
    ("awq", 256): (0.018197269429144142, 0.015424747712637557, 0.020929360061740662, 2.3369736968408885,
                   0.9476318359375),
    ("awq", 512): (0.03645542888704836, 0.029250173828388855, 0.04354388894669123, 2.4362740595212875, 0.95166015625),
    ("rtn", 256): (0.0374149104509478, 0.032315209151052585, 0.042546158262472544, 2.365593689450182, 0.9339599609375),
    ("rtn", 512): (0.07707595479809992, 0.06328545653960269, 0.09027570998086348, 2.453745691435539, 0.93505859375),
}  # fmt: skip


def ends(interval: Interval) -> Numbers:
    return interval.estimate, interval.low, interval.high


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A copy of the stored run, which commands may write to."""
    return Path(shutil.copytree(STORED, tmp_path / "runs" / STORED.name))


def test_the_numbers_are_those_of_before() -> None:
    found = load_run(STORED).summary
    assert found.comparisons == 4
    every = {(name, task): done for name, model in found.models.items() for task, done in model.tasks.items()}
    assert {(name, task): ends(done.rate) for (name, task), done in every.items()} == RATES
    losses = {}
    for (name, task), done in every.items():
        if done.loss is not None and done.loss.recovery is not None:
            d, comparisons = done.loss.difference, done.loss.comparisons
            numbers = (*ends(d.loss), d.lost, d.gained, d.problems, d.detectable, d.p, done.loss.p_holm)
            losses[name, task] = (numbers, ends(done.loss.recovery))
            assert comparisons == 4
    assert losses == LOSSES
    texts = {
        (name, length): (*ends(text.kl), text.perplexity.estimate, text.top1)
        for name, model in found.models.items()
        for length, text in model.texts.items()
    }
    assert texts == TEXTS


def test_the_table_is_the_one_of_before() -> None:
    found = load_run(STORED).summary
    row = {row["model"]: row for row in score_rows(found)}["awq"]
    assert (row["size"], row["bits"]) == ("1.6 MB", "6.53 bpw")
    assert {head: cell for head, cell in row.items() if "sampled" in head or "512" in head} == {
        "perplexity, 512 tokens": "2.436",
        "KL to source, 512 tokens": "0.0365 [0.0293, 0.0435]", "top-1, 512 tokens": "95.2%",
        "sampled, pass@1 of 10": "69.6% [59.6, 75.8]", "sampled, pass@10": "100.0% [100.0, 100.0]",
        "sampled, pass@1 of 10: points lost": "10.0 [-3.5, 21.5], p=0.056",
        "sampled, pass@1 of 10: recovery": "87.4% [72.9, 104.3]",
    }  # fmt: skip
    assert "sampled: 1 problem of the benchmark could not be asked here. sampled: 3 of 24 programs" in footnote(found)


@pytest.mark.parametrize(
    ("gate", "verdict", "reason"),
    [
        ({"min_bits_saved": 9.5}, "fail", "9.47 bpw saved is below 9.5"),
        ({"max_kld": 0.03}, "pass", "mean KL 0.0182 [0.01542, 0.02093]: within max_kld 0.03 (95 % sure)"),
        ({"max_drop": 10, "task": "sampled"}, "undecided",
         "lost 10.0 points [-3.5, 21.5] on 24 problems: the interval includes max_drop 10; "
         "24 problems show losses from 18.0 points on"),
        ({"min_recovery": 0.9, "task": "sampled"}, "undecided",
         "recovery 0.8743 [0.7294, 1.043]: the interval includes min_recovery 0.9"),
        ({"max_drop": 1, "task": "x"}, "undecided", "the source has no score on x"),
    ],
)  # fmt: skip
def test_the_verdicts_are_those_of_before(gate: dict[str, Any], verdict: str, reason: str) -> None:
    (result,) = judge(load_run(STORED).summary, [GateSection(output="awq", **gate)])
    assert (result.verdict, result.reason) == (verdict, reason)


def test_it_is_computed_once(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_run(stored).summary
    save_summary(stored, found)
    monkeypatch.setattr(summary, "bootstrap_mean", None)  # whoever computes again fails
    assert load_run(stored).summary == found
    assert measured(stored).subjects["awq"].texts[256].kl == found.models["awq"].texts[256].kls


def test_of_other_scores_it_is_computed_anew(stored: Path) -> None:
    before = load_run(stored).summary
    save_summary(stored, before)
    key = json.loads((stored / "scores.json").read_text())["fidelity"]["awq"]
    (file,) = (stored / "scores").glob(f"*-{key[:16]}.json")
    score = json.loads(file.read_text())
    file.write_text(json.dumps(score | {"kl": [2 * x for x in score["kl"]]}))
    text = load_run(stored).summary.models["awq"].texts[256]
    assert text.kl.estimate == pytest.approx(2 * before.models["awq"].texts[256].kl.estimate)


@pytest.mark.parametrize("text", [b"", b"null", b'{"models": {}}', b"[" * 100_000, b"\xff\xfe"])
def test_a_damaged_one_is_computed_anew(stored: Path, text: bytes) -> None:
    (stored / summary.SUMMARY).write_bytes(text)
    assert load_run(stored).summary == load_run(STORED).summary


def test_what_is_no_number_is_kept(stored: Path) -> None:
    nothing = [math.nan] * 32
    scores = load_run(stored).scores
    broken: FidelityScore = scores.fidelity["awq"].model_copy(update={"kl": nothing, "nll": nothing})
    one = scores.fidelity["rtn"].model_copy(update={"kl": [0.1], "nll": [1.0], "top1": [0.9]})
    made = summarise(Scores(fidelity={"source": scores.fidelity["source"], "awq": broken, "rtn": one}))
    save_summary(stored, made)
    found = stored_summary(stored, made.evidence)
    assert found is not None
    awq, rtn = found.models["awq"].text, found.models["rtn"].text
    assert awq is not None
    assert rtn is not None
    assert all(map(math.isnan, (*ends(awq.kl), awq.perplexity.low, *awq.kls)))
    assert ends(rtn.kl) == (0.1, -math.inf, math.inf)  # of one window nobody knows the spread
    assert (rtn.perplexity.low, rtn.perplexity.high) == (0.0, math.inf)
    (result,) = judge(found, [GateSection(max_kld=1, output="awq")])
    assert (result.verdict, "not a number" in result.reason, result.evidence) == ("fail", True, None)


def test_other_problems_are_not_paired() -> None:
    scores = load_run(STORED).scores
    score = scores.tasks["awq"]["sampled"]
    fewer = dict(list(score.outcomes.items())[:5])
    scores.tasks["awq"]["sampled"] = score.model_copy(update={"outcomes": fewer})
    with pytest.raises(QtoolError, match="sampled: source and awq were asked other problems"):
        summarise(scores)


def test_a_card_of_one_model_shows_the_runs_p() -> None:
    """p was adjusted over the run; a table of fewer models says so, and adjusts nothing again."""
    run = load_run(STORED)
    alone = run.summary.only(["awq"])
    assert list(alone.models) == ["source", "awq"]
    assert score_rows(alone) == [row for row in score_rows(run.summary) if row["model"] != "rtn"]
    assert "Holm-adjusted over the 4 comparisons of the run" in footnote(alone)
    said = dict(cost_lines(run))
    assert "lost 10.0 points [-3.5, 21.5] on sampled (no loss is shown, p=0.056, Holm over 4)" in said["awq"]


def test_speeds_are_the_ledgers_and_outlive_it(stored: Path) -> None:
    made = Measurement("k", "m", "vllm", "1", "card", 32, 3, "2026-01-01", (), "no card")
    newer = Measurement("k", "m", "vllm", "2", "card", 32, 3, "2026-02-01", (), "no card")
    found = load_run(stored).summary.with_measured({"awq": [made]})
    save_summary(stored, found)
    assert load_run(stored).summary.measured == {"awq": [made]}
    assert found.with_measured({"awq": [newer]}).measured == {"awq": [newer]}


def test_gates_where_nothing_can_be_judged() -> None:
    """A model that this run did not make has no sizes; a model alone has no source. Neither passes in silence."""
    scores = load_run(STORED).scores
    evaluated = summarise(scores)
    for gate in ({"max_size": 1.0}, {"min_bits_saved": 1.0}):
        (result,) = judge(evaluated, [GateSection(output="awq", **gate)])
        assert (result.verdict, "not known" in result.reason) == ("undecided", True)
    only = Summary(models={"source": evaluated.models["source"]}, comparisons=0, evidence="")
    (result,) = judge(only, [GateSection(max_kld=1.0)])
    assert (result.verdict, result.reason) == ("undecided", "no model was scored against a source")


def test_check_json_has_the_numbers(stored: Path, tmp_path: Path) -> None:
    call = CliRunner(env={"COLUMNS": "300"}).invoke
    out, base = tmp_path / "check.json", tmp_path / "baseline.json"
    assert call(main, ["baseline", "save", str(stored), str(base)]).exit_code == 0
    call(main, ["check", str(stored), "--json", str(out), "--baseline", str(base)])
    results = {(r["output"], r["gate"]): r for r in json.loads(out.read_text())["results"]}
    kl = results["awq", "max_kld 0.03"]
    assert (kl["verdict"], kl["evidence"]["limit"], kl["evidence"]["n"]) == ("pass", 0.03, 32)
    assert kl["evidence"]["interval"] == {
        "estimate": 0.018197269429144142, "low": 0.015424747712637557, "high": 0.020929360061740662, "confidence": 0.95,
    }  # fmt: skip
    loss = results["awq", "max_drop 10 points on heldout"]["evidence"]
    assert (loss["measure"], loss["value"], loss["limit"]) == ("loss", 1.6666666666666667, 10)
    assert (loss["p"], loss["p_holm"], loss["comparisons"]) == (0.5, 1.0, 4)
    same = results["rtn", "no regression: sampled"]["evidence"]
    assert (same["before"], same["after"], same["value"]) == (0.41250000000000003, 0.41250000000000003, 0.0)
    assert (same["p_holm"], same["comparisons"], same["alpha"]) == (1.0, 6, 0.05)
    assert "p=1, Holm over 6" in results["rtn", "no regression: sampled"]["reason"]
    assert results["awq", "verified"]["evidence"] is None


def test_a_model_of_no_bytes_is_refused(stored: Path) -> None:
    """Ratios of sizes stand in report and compare."""
    lock = json.loads((stored / "lock.json").read_text())
    lock["source"]["bytes"] = 0
    (stored / "lock.json").write_text(json.dumps(lock))
    result = CliRunner().invoke(main, ["report", str(stored)])
    assert (result.exit_code, "lock.json" in result.output, "source.bytes" in result.output) == (2, True, True)
    shutil.copy(STORED / "lock.json", stored / "lock.json")
    made = json.loads((stored / "manifests/awq.json").read_text())
    (stored / "manifests/awq.json").write_text(json.dumps(made | {"tensor_bytes": 0}))
    result = CliRunner().invoke(main, ["report", str(stored)])
    assert (result.exit_code, "awq.json: tensor_bytes" in result.output) == (2, True)


def test_a_ledger_of_brackets_is_read_past(tmp_path: Path) -> None:
    (tmp_path / ledger.LEDGER).write_bytes(b"[" * 1_000_000 + b"\n" + b'{"run": "a"}\n')
    assert ledger.read(tmp_path) == [{"run": "a"}]


def test_an_evaluation_has_one(stored: Path) -> None:
    """Without a lock: the scores alone, whose sizes nobody knows."""
    for name in ("lock.json", "result.json"):
        (stored / name).unlink()
    found = load_summary(stored)
    assert found.models["awq"].size is None
    assert found.models["awq"].texts == load_run(STORED).summary.models["awq"].texts


def test_sizes_are_part_of_what_it_is_of() -> None:
    scores = Scores()
    assert summarise(scores, {"a": Size(1, 1.0)}).evidence != summarise(scores, {"a": Size(2, 1.0)}).evidence
