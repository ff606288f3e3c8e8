"""A task that cannot show a loss is called uninformative, everywhere, and never `no loss is shown`."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.evaluate.scorecard import ProblemOutcome, Scores, Settings, TaskScore
from qtool.recipe.judging import GateSection
from qtool.report import terminal
from qtool.report.tables import footnote, score_rows
from qtool.runs.baseline import Measured, TaskResult
from qtool.runs.check import _result
from qtool.runs.compare import Change, compare
from qtool.runs.evidence import plain
from qtool.runs.gates import judge
from qtool.runs.informative import uninformative
from qtool.runs.summary import Summary, summarise

SETTINGS = Settings(engine="reference", dtype="float32", device="cpu", prompt="completion", max_new_tokens=8)


def score(name: str, solved: int, of: int) -> TaskScore:
    outcomes = {
        f"t/{i}": ProblemOutcome(outcome="passed" if i < solved else "failed", detail="", completion="")
        for i in range(of)
    }
    return TaskScore(subject=name, key="k" * 16, task="hard", digest="d", settings=SETTINGS, outcomes=outcomes,
                     sandbox="namespaces", seconds=1.0)  # fmt: skip


def summary(source: int, awq: int, of: int = 20) -> Summary:
    scores = Scores()
    for name, solved in (("source", source), ("awq", awq)):
        scores.tasks[name] = {"hard": score(name, solved, of)}
    return summarise(scores)


@pytest.mark.parametrize(
    ("source", "awq", "said"),
    [
        (0, 0, "uninformative: the source solves 0 of 20"),
        (0, 3, "uninformative: the source solves 0 of 20"),
        (20, 20, "uninformative: every model solves 20 of 20"),
        (20, 19, ""),
        (1, 0, ""),
    ],
)
def test_the_word_and_why(source: int, awq: int, said: str) -> None:
    counts = [[int(i < solved) for i in range(20)] for solved in (source, awq)]
    assert uninformative(counts, 1) == said
    found = summary(source, awq)
    cell = score_rows(found)[1]["hard: points lost"]
    assert (cell == "uninformative") == bool(said)
    assert (f"hard is {said}: it cannot show a loss." in footnote(found)) == bool(said)


def verdict(found: Summary, **gate: object) -> tuple[str, str]:
    (result,) = judge(found, [GateSection.model_validate(gate)])
    return result.verdict, result.reason


def test_gates_pass_nothing_that_could_not_fail() -> None:
    assert verdict(summary(0, 0, 400), max_drop=10) == ("undecided", "uninformative: the source solves 0 of 400")
    assert verdict(summary(0, 0, 400), min_recovery=0.9) == ("undecided", "uninformative: the source solves 0 of 400")
    low = verdict(summary(20, 0, 400), max_drop=10)
    assert low == ("undecided", "uninformative: the source's whole score, 5.0 points, is within max_drop 10")
    assert verdict(summary(200, 198, 400), max_drop=10)[0] == "pass"
    assert verdict(summary(400, 400, 400), max_drop=10)[0] == "pass", "nothing was lost of 400: that is shown"


def measured(solved: int) -> Measured:
    task = TaskResult(digest="d", settings=SETTINGS, samples=1, solved={f"t/{i}": int(i < solved) for i in range(20)})
    return Measured(key="k", nbytes=None, bits_per_weight=None, tasks={"hard": task}, texts={})


@pytest.mark.parametrize(("a", "b", "shown"), [(0, 0, "uninformative"), (20, 20, "uninformative"), (0, 12, "better")])
def test_a_comparison_of_nothing_says_so(a: int, b: int, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    (change,) = compare([("awq", measured(a), measured(b))], True)
    assert change.shown == shown
    terminal.print_changes([change], [])
    said = capsys.readouterr().out
    assert ("Nothing here can show a loss" in said, "No loss" in said) == (shown != "better", shown == "better"), said
    result = _result(change)
    assert (result.verdict, result.failed) == ("undecided" if shown == "uninformative" else "pass", False)


@pytest.mark.parametrize(
    ("value", "said"), [(5.2e-7, "0.00000052"), (1180.4, "1180"), (0.03, "0.03"), (123456.0, "123500"), (0.0, "0")]
)
def test_numbers_have_no_exponent(value: float, said: str) -> None:
    assert plain(value) == said


def test_the_table_of_a_stored_run_fits_eighty_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from qtool.runs.record import load_run

    monkeypatch.setattr(terminal, "console", Console(width=80))
    run = load_run(Path(__file__).parent / "data" / "stored_run" / "00265698")
    terminal.print_rows(score_rows(run.summary), "stored")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for row in score_rows(run.summary):
        for cell in row.values():
            assert any(cell in line for line in lines), f"{cell} is torn"


def test_what_only_one_side_measured_has_no_sides(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_changes([Change("awq", "KL", "not judged", None, "only A has it", "A")], [])
    assert "awq: KL: only A has it" in capsys.readouterr().out
