"""Long tasks that are made: as long as they say, with one right answer, judged by what runs; drawn by depth."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_models import PROBLEM

from qtool import QtoolError
from qtool.cli import main
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.evaluate.sandbox.execute import run_programs
from qtool.evaluate.scorecard import ProblemOutcome, Scores, Settings, TaskScore
from qtool.evaluate.tasks import prompts
from qtool.evaluate.tasks.depots import codes
from qtool.evaluate.tasks.loading import as_job, load_task
from qtool.evaluate.tasks.made import Making, question_of
from qtool.evaluate.tasks.problems import Problem
from qtool.evaluate.tasks.table import made
from qtool.measure.questions import shown, tasks_of
from qtool.recipe.judging import EvaluateSection, TaskSection
from qtool.recipe.long import MadeSection
from qtool.report.depths import depth_map, depth_pictures, depth_rows
from qtool.runs.depths import by_depth, by_length, place_of
from qtool.runs.summary import summarise

NAMES = list(made())
SMALL = Making(lengths=(2048, 4096), depths=3, look_alikes=4, each=1)


def problems(name: str, making: Making = SMALL) -> tuple[Problem, ...]:
    return load_task(name, making=making).problems


def judged(pairs: list[tuple[Problem, str]], style: prompts.Style = "completion") -> list[str]:
    jobs = [as_job(problem, prompts.program(problem, text, style)) for problem, text in pairs]
    return [outcome.outcome for outcome in run_programs(jobs, timeout=20.0, sandbox="none")]


def test_names() -> None:
    assert NAMES == ["long-call", "long-combine", "long-change"]


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_pass_in_both_styles_and_each_others_fail(name: str) -> None:
    asked = problems(name)
    assert len(asked) == 12
    assert judged([(p, p.canonical_solution) for p in asked]) == ["passed"] * 12
    whole = [(p, f"Here:\n\n```python\n{question_of(p)}{p.canonical_solution}```\n") for p in asked]
    assert judged(whole, "chat") == ["passed"] * 12
    shifted = [(p, other.canonical_solution) for p, other in zip(asked, asked[1:] + asked[:1], strict=True)]
    assert "passed" not in judged(shifted)


def test_a_look_alike_is_no_answer() -> None:
    """Every function of the file but the one: a model that calls the nearest is wrong."""
    problem = next(p for p in problems("long-call") if "/4/" in p.task_id)
    right = re.search(r"charge_\w+", problem.canonical_solution)
    assert right is not None
    calls = re.findall(r"^def (charge_\w+)\(units, \*, (\w+)\)", problem.setup, re.M)
    assert len(calls) == 5
    texts = {name: f"    return {name}(units, {keyword}=level)\n" for name, keyword in calls}
    outcomes = dict(zip(texts, judged([(problem, text) for text in texts.values()]), strict=True))
    assert [name for name, outcome in outcomes.items() if outcome == "passed"] == [right[0]]


def test_a_program_that_compares_the_versions_finds_none() -> None:
    problem = problems("long-change")[0]
    cheat = "    import inspect, sys\n    return [n for n in globals() if n.startswith('charge_')][0], 1\n"
    assert judged([(problem, cheat)]) == ["failed"]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_as_long_as_they_say_in_the_models_own_tokens(name: str, tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    section = EvaluateSection(tasks=(TaskSection(task=name, made=MadeSection(lengths=(4096, 8192), each=1)),))
    (task,) = tasks_of(section, None, tokenizer).values()
    assert task.source == "made by qtool: 4,096, 8,192 tokens"
    for problem in task.problems:
        place = place_of(problem.task_id)
        assert place is not None
        tokens = len(tokenizer(problem.prompt).input_ids)
        assert 0.9 * place.length < tokens <= place.length


def test_needles_lie_at_their_depth() -> None:
    for problem in problems("long-call", Making((8192,), 5, 3, 1)):
        place = place_of(problem.task_id)
        called = re.search(r"charge_\w+", problem.canonical_solution)
        assert place is not None
        assert called is not None
        at = problem.prompt.index(f"def {called[0]}(") / len(problem.prompt)
        assert abs(at - place.depth) < 0.06


def test_exactly_one_number_changes_between_versions() -> None:
    for problem in problems("long-change"):
        first, second = problem.prompt.split("# ---- Second version of the file ----")
        before = [line for line in first.splitlines()[1:] if not line.startswith("# Checked")]
        after = [line for line in second.splitlines() if not line.startswith("# Checked")]
        after = after[: after.index("def changed():")]
        changed = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ") and line[2:].strip()]
        assert len(changed) == 2
        new = re.search(r", (\d+)\)", problem.canonical_solution)
        assert new is not None
        assert re.search(rf"\b{new[1]}\b", changed[1]) or re.search(rf"\b{new[1]}\b", changed[0])


def test_the_same_seed_makes_the_same_and_another_does_not() -> None:
    digest = load_task("long-combine", making=SMALL).digest
    assert load_task("long-combine", making=SMALL).digest == digest
    assert load_task("long-combine", making=Making((2048, 4096), 3, 4, 1, seed=1)).digest != digest


def test_there_are_as_many_look_alikes_as_asked_for() -> None:
    drawn = random.Random(1)
    found = codes(drawn, 100, "Q7-LIMA")
    assert len(set(found)) == 100
    same = [sum(a == b for a, b in zip(re.split("-|(?<=[A-Z])(?=[0-9])", code), ("Q", "7", "LIMA"), strict=True))
            for code in found]  # fmt: skip
    assert same[:20] == [2] * 20
    assert min(same) >= 1


def test_the_control_has_no_look_alikes() -> None:
    for name in ("long-call", "long-combine"):
        for problem in problems(name):
            alike = problem.setup.count("The charge of depot") + problem.setup.count("The weight of depot")
            place = place_of(problem.task_id)
            assert place is not None
            assert (alike > 3) == (place.look_alikes > 0)


def test_the_harness_checks_itself_on_them() -> None:
    asked = ["--task", "long-call", "--limit", "8", "--sandbox", "none"]
    result = CliRunner().invoke(main, ["evaluate", "--self-check", *asked])
    assert result.exit_code == 0, result.output
    assert "8 published solutions passed, 16 wrong answers failed" in result.output


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"task": "long-call", "made": {"lengths": [8192]}}, r"8,192 tokens, 256 .* answer of 384 .*up to 3456 fit"),
        ({"task": "long-call", "made": {"lengths": [512], "look_alikes": 90}}, "too short for 90 look-alikes"),
        ({"task": "long-call", "file": "x.jsonl", "made": {"lengths": [2048]}}, "`file` is for the benchmarks"),
    ],
)
def test_what_cannot_be_made_is_refused(asked: dict[str, Any], said: str) -> None:
    class Config:
        max_position_embeddings = 4096

    section = EvaluateSection(tasks=(TaskSection(**asked),))
    with pytest.raises(QtoolError, match=said):
        tasks_of(section, Config(), None)


def test_made_is_refused_for_other_tasks() -> None:
    with pytest.raises(ValueError, match="is for the tasks long-call, long-combine, long-change"):
        TaskSection(task="humaneval", made=MadeSection(each=1))


def test_readers_are_shown_the_ends_of_a_long_prompt() -> None:
    prompt = "a" * 50_000 + "b" * 50_000
    assert len(shown(prompt)) < 25_000
    assert shown(prompt).startswith("aaa")
    assert "76,000 characters" in shown(prompt)
    assert shown("short") == "short"


def scored(subject: str, lost: int) -> TaskScore:
    """One model that solves all problems but those of this depth step at the longest length."""
    outcomes = {}
    for problem in problems("long-call"):
        place = place_of(problem.task_id)
        assert place is not None
        missed = place.length == 4096 and round(place.depth * 2) == lost
        outcome = ProblemOutcome(outcome="failed" if missed else "passed", detail="", completion="")
        outcomes[problem.task_id] = outcome
    settings = Settings(engine="reference", dtype="float32", device="cpu", prompt="", max_new_tokens=1)
    return TaskScore(key="k", subject=subject, task="long-call", digest="d", settings=settings, sandbox="none",
                     seconds=1.0, outcomes=outcomes)  # fmt: skip


def test_scores_are_told_by_depth_and_length() -> None:
    scores = Scores(tasks={"source": {"long-call": scored("source", 9)}, "awq": {"long-call": scored("awq", 1)}})
    summary = summarise(scores)
    task = summary.models["awq"].tasks["long-call"]
    cells = by_depth(task)
    assert cells[0.5, 4096] == 0.0
    assert sum(cells.values()) == len(cells) - 1
    rates = by_length(task)
    assert rates[4096, True].estimate == pytest.approx(2 / 3)
    assert rates[2048, False].estimate == 1.0
    rows = depth_rows(summary)
    assert [(row["model"], row["half"]) for row in rows] == [
        ("source", "look-alikes"), ("source", "control"), ("awq", "look-alikes"), ("awq", "control"),
    ]  # fmt: skip
    assert rows[2]["4K"].startswith("67% [")
    assert task.loss is not None
    assert task.loss.difference.lost == 2  # paired problem by problem, the control too
    assert [name for name, *_ in depth_pictures(summary)] == ["depths-0", "depths-1"]
    picture = depth_map(cells, "awq: long-call")
    assert "least at depth 50% of 4,096 tokens" in picture
    assert picture.count(">0%<") == 2  # the first row's name, and the cell that was missed
    assert PROBLEM["task_id"] not in picture
    assert place_of("HumanEval/3") is None


def test_a_model_is_asked_them(
    model_maker: Callable[..., Path], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """From the recipe to the report, under two conditions that are two tasks."""
    from qtool.report.files import write_report
    from qtool.run import run

    model = model_maker(tmp_path / "model", max_position_embeddings=4096)
    task = {"task": "long-call", "made": {"lengths": [1024], "depths": 2, "each": 1, "look_alikes": 1}}
    asked = {"tasks": [task], "max_new_tokens": 4, "conditions": [{"cache": "q8_0"}], "sandbox": "none"}
    plain = {"method": "awq", "group_size": 32, "scaling": "none", "rounding": "rtn"}
    finished = run(write_recipe(model=str(model), outputs=[plain], evaluate=asked), tmp_path / "runs", device="cpu")
    assert finished is not None
    tasks = finished.summary.models["awq"].tasks
    assert list(tasks) == ["long-call", "long-call @ q8_0"]
    assert [found.settings.condition for found in tasks.values()] == ["", "q8_0, simulated"]
    assert tasks["long-call"].settings.differences(tasks["long-call @ q8_0"].settings)
    html = write_report(finished, tmp_path / "out").read_text()
    assert "Long tasks, by length and depth" in html
    assert (tmp_path / "out" / "figures" / "depths-0.svg").exists()
