"""Scorecards: what may be read from them, what may be paired, and pass@k against counting every draw."""

from __future__ import annotations

from itertools import combinations

import pytest
from pydantic import ValidationError

from qtool.evaluate.scorecard import ProblemOutcome, Settings, TaskScore, pass_at_k

SETTINGS = Settings(engine="reference", dtype="float32", device="cpu", prompt="completion", max_new_tokens=64)


def answer(outcome: str) -> ProblemOutcome:
    return ProblemOutcome.model_validate({"outcome": outcome, "detail": "", "completion": "    return 1\n"})


def score(*answers: str, samples: int = 1) -> TaskScore:
    """One letter an answer, one word a problem: p(assed), f(ailed), e(rror)."""
    words = {"p": "passed", "f": "failed", "e": "error"}
    rows = {f"t/{i}": tuple(answer(words[letter]) for letter in word) for i, word in enumerate(answers)}
    return TaskScore(
        key="k", subject="s", task="t", digest="d", settings=SETTINGS, sandbox="none", seconds=1.0, samples=samples,
        outcomes={name: row[0] for name, row in rows.items()},
        more={name: row[1:] for name, row in rows.items()} if samples > 1 else {},
    )  # fmt: skip


def test_one_sample_has_outcomes_and_rates() -> None:
    assert score("p", "f").passed == [True, False]
    assert score("p", "f").rates == [1.0, 0.0]


def test_several_samples_have_rates_only() -> None:
    found = score("pfpf", "ffff", "pppp", samples=4)
    assert found.rates == [0.5, 0.0, 1.0]
    assert found.solved == [2, 0, 4]
    assert len(found.answers("t/0")) == 4
    with pytest.raises(ValueError, match="4 samples a problem have rates"):
        _ = found.passed


@pytest.mark.parametrize("name", ["passed", "rates"])
def test_a_failed_sandbox_is_no_score(name: str) -> None:
    with pytest.raises(ValueError, match=r"1 answers could not be run \(t/1"):
        getattr(score("p", "e"), name)


def test_a_score_holds_every_sample() -> None:
    with pytest.raises(ValidationError, match="2 further answers"):
        score("pp", "pp", samples=3)
    assert TaskScore.model_validate_json(score("pf", "ff", samples=2).model_dump_json()).rates == [0.5, 0.0]


def test_scores_made_differently_are_never_paired() -> None:
    newer = SETTINGS.model_copy(update={"version": "torch 3"})
    assert SETTINGS.differences(newer) == []
    other = SETTINGS.model_copy(update={"dtype": "bfloat16", "prompt": "chat"})
    assert SETTINGS.differences(other) == ["dtype float32 and bfloat16", "prompt completion and chat"]


def test_pass_at_k_counts_every_draw() -> None:
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_literally() -> None:
    assert pass_at_k(200, 0, 100) == 0.0
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert pass_at_k(10_000, 9_999, 2) == 1.0
    with pytest.raises(ValueError, match="pass@3 of 2 samples"):
        pass_at_k(2, 1, 3)
