"""`qtool evaluate --plan`: the number of problems that it names shows the loss as often as it says."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qtool.cli import main
from qtool.evaluate.statistics import detectable_loss, mcnemar_exact, problems_needed
from qtool.evaluate.tasks.loading import load_task, task_sizes
from qtool.report.power import told_by
from qtool.runs.power import ASSUMED, Seen, pooled, power_of, seen_in

STORED = Path(__file__).parent / "data" / "stored_run" / "00265698"


@pytest.mark.parametrize(("points", "share"), [(5.0, 0.1), (2.0, 0.05), (10.0, 0.1)])
def test_so_many_problems_have_the_promised_power(points: float, share: float) -> None:
    n, loss = problems_needed(points, share), points / 100
    psi = max(share, loss)
    generator = np.random.default_rng(0)
    lost, gained, _ = generator.multinomial(n, [(psi + loss) / 2, (psi - loss) / 2, 1 - psi], size=1500).T
    shown = np.mean([mcnemar_exact(int(b), int(c)) < 0.05 for b, c in zip(lost, gained, strict=True)])
    assert 0.7 < shown < 0.88, "the exact test is a little more careful than the formula"


def test_needed_and_detectable_are_each_others_inverse() -> None:
    for share in (0.02, 0.1, 0.3):
        n = problems_needed(3.0, share)
        at, before = (detectable_loss(round(share * m), m, 0.95) for m in (n, round(0.8 * n)))
        assert at is not None
        assert before is not None
        assert at == pytest.approx(3.0, abs=0.1)
        assert before > 3.2
    with pytest.raises(ValueError, match="cannot be"):
        problems_needed(0, 0.1)
    with pytest.raises(ValueError, match="cannot be"):
        problems_needed(1, 1.5)


def test_shares_come_from_the_task_else_from_all_else_are_assumed() -> None:
    seen = {"a": Seen(10, 100), "b": Seen(0, 300)}
    assert pooled(seen).share == 0.025
    own, none, other = power_of({"a": 100, "b": 100, "c": 100}, seen, None)
    assert (own.discordance, own.seen) == (0.1, True)
    assert none.discordance == pytest.approx(0.0089, abs=1e-4), "no change in 300 is no proof that there is none"
    assert none.seen
    assert (other.discordance, other.seen) == (0.025, False)
    assert power_of({"a": 100}, {}, None)[0].discordance == ASSUMED
    assert [task.discordance for task in power_of({"a": 9, "b": 9}, seen, 0.3)] == [0.3, 0.3]


def test_what_runs_saw_is_counted_and_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "runs" / "a")
    shutil.copytree(STORED, tmp_path / "runs" / "b")
    (tmp_path / "runs" / "b" / "scores.json").write_text("{")
    seen = seen_in(tmp_path / "runs")
    assert set(seen) == {"heldout"}, "several answers to a problem are another matter"
    assert 0 < seen["heldout"].changed < seen["heldout"].asked
    assert seen_in(tmp_path / "none") == {}


def test_what_was_seen_is_said_and_too_little_of_it_is_not_taken() -> None:
    """0 of 5 tells nothing; 0 of 300 that it is less than 0.9 % (Wilson, 95 % one-sided)."""
    few, none, some = Seen(0, 5), Seen(0, 300), Seen(12, 100)
    assert (few.share, some.share) == (None, 0.12)
    assert none.share == pytest.approx(2.7055 / (300 + 2.7055), rel=1e-3)
    assert told_by(few) == "assumed: 10%; 0 of 5 outcomes of artifacts in earlier runs changed, too little to tell"
    assert told_by(none).startswith("at most that (95 % sure): 0 of 300 outcomes")
    assert told_by(some) == "from 12 of 100 outcomes of artifacts in earlier runs"
    assert Seen(4, 9).share is None, "many of few: no less than what is assumed"


def test_sizes_are_those_of_the_tasks() -> None:
    sizes = task_sizes()
    for task in ("handwritten", "heldout"):
        assert sizes[task] == len(load_task(task).problems)
    assert sizes["humaneval"] == 164


def test_the_command_answers_before_anything_is_asked(tmp_path: Path) -> None:
    def call(*typed: str) -> str:
        result = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["evaluate", "--plan", "--runs", str(tmp_path), *typed])
        assert result.exit_code == 0, result.output
        return result.output

    said = call("--detect", "1")
    assert "To show a loss of 1 point: 7,847 problems, if 10.0% of the outcomes change." in said
    assert "assumed: 10%; no earlier run tells" in said
    assert "No task alone is enough" in said
    assert max(len(line) for line in said.splitlines() if line.startswith("  ")) <= 80
    enough = call("--detect", "5", "--task", "heldout", "--discordance", "0.03")
    assert "yes" in enough
    assert "No task alone" not in enough
    assert not any(tmp_path.iterdir())
