"""An engine and a benchmark more: each is one module and its row in a table; here the module is this file."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from qtool.cli.evaluate import evaluate
from qtool.cli.sizing import measure, plan
from qtool.evaluate.answers import Asking, answer_task
from qtool.evaluate.engines.engine import Batch, Completion, Decoding, Engine, Model, Reading, Request, Running, Use
from qtool.evaluate.engines.facts import CacheType, Efficiency, EngineFacts, Load, OffloadRule, Overhead, Serving
from qtool.evaluate.engines.table import ENGINES, planned
from qtool.evaluate.journal import Journal
from qtool.evaluate.tasks.benchmark import Benchmark, DataSet
from qtool.evaluate.tasks.loading import load_task
from qtool.evaluate.tasks.problems import Problem
from qtool.evaluate.tasks.rows import Row, problem, text_of
from qtool.evaluate.tasks.table import BENCHMARKS
from qtool.measure.run import Trial, measure_model
from qtool.measure.scoring_engine import open_engine, settings_for, settings_of
from qtool.measure.subjects import Subject
from qtool.recipe.judging import EvaluateSection, TaskSection
from qtool.sizing.accelerators import load_accelerators
from qtool.sizing.headers import read_headers
from qtool.sizing.plan import Question, make_plan

IQUEST = Path(__file__).parent / "data" / "iquest" / "IQuest-Coder-V1-14B"

# An engine: it knows one answer, and keeps its cache in thirds of a byte, by pages of a hundred tokens.


class ToyModel:
    name, version, dtype, device = "toy", "toy 1", "int3", "abacus"

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[Completion]:
        return ((index, "x + 1") for index in range(len(requests)) if index not in done)

    def time(self, batch: Batch) -> Reading:
        count = len(batch.prompts)
        return Reading((1.0,) * count, (0.5,) * count, 2.0, count * batch.tokens, None, {"resident": 7})

    def prepare(self, windows: torch.Tensor) -> None:
        return None

    def logits(self, window: torch.Tensor) -> None:
        return None


@contextmanager
def open_toy(model: Model, use: Use) -> Iterator[Running]:
    assert model.path is not None
    assert use.context() > 0
    yield ToyModel()


TOY = Engine(
    EngineFacts(
        name="toy",
        packages=("torch",),
        place="abacus",
        dtype=lambda device: "int3",
        cache_types=(CacheType("third", Fraction(1, 3)),),
        cells=lambda context, window, chunk: -(-context // 100) * 100,
        overhead=lambda load: overhead(load),
        memory_share=0.5,
        offload=OffloadRule(flag=lambda units, layers: f"--elsewhere {units}"),
        efficiency=Efficiency(0.5, 0.5, 0.5, 0.0, 0.0),
        command=lambda serving: command(serving),
        refuses_model=lambda config: [],
    ),
    open_toy,
    machine=lambda device: "an abacus",
)


def overhead(load: Load) -> Overhead:
    return Overhead(load.context * load.sequences, 1000)


def command(serving: Serving) -> str:
    return f"toy {serving.place} {serving.context}x{serving.sequences} {serving.cache_type}{serving.offload}"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "toy", TOY)


@pytest.mark.usefixtures("toy")
def test_an_engine_is_planned_for() -> None:
    headers = read_headers(str(IQUEST))
    card = load_accelerators()["H100"]
    asked = Question([card], engine="toy", formats=("source",), contexts=(1050,), sequences=(2,))
    (answer,) = make_plan(headers, asked).answers
    (found,) = answer.cells
    assert found.cache == 2 * 1100 * 2 * headers.geometry.kv_row * headers.geometry.layers // 3
    assert (found.overhead.activations, found.overhead.fixed) == (2100, 1000)
    assert found.limit == card.memory // 2
    assert answer.command == f"toy {headers.place} 1050x2 third"


@pytest.mark.usefixtures("toy")
def test_an_engine_is_measured(tiny: Path) -> None:
    trial = Trial(str(tiny), "toy", (16,), (1, 2), 4, 1, "cpu", None, None)
    found = measure_model(trial)
    assert (found.engine, found.machine) == ("toy", "an abacus")
    assert found.version.startswith("torch ")
    assert [(row.status, row.step_seconds, row.memory) for row in found.rows] == [("ok", 0.5, {"resident": 7})] * 2


@pytest.mark.usefixtures("toy")
def test_an_engine_answers(tiny: Path, tmp_path: Path) -> None:
    section = EvaluateSection(tasks=(TaskSection(task="handwritten"),)).model_copy(update={"engine": "toy"})
    subject = Subject("m", "key", path=tiny)
    settings = settings_of(section, torch.device("cpu"), "completion")
    assert (settings.engine, settings.dtype, settings.device) == ("toy", "int3", "abacus")
    assert settings_for(settings, subject, False) == settings
    with open_engine(section, subject, None, None, torch.device("cpu"), False, []) as running:
        assert list(running.generate([Request("p", lambda text: False)], Decoding(4, 1))) == [(0, "x + 1")]
        assert running.logits(torch.zeros(3)) is None


def test_commands_and_recipes_offer_what_the_table_has() -> None:
    def choices(command: Any) -> list[str]:
        return next(list(option.type.choices) for option in command.params if option.name == "engine")

    assert choices(evaluate) == list(ENGINES) == list(get_args(EvaluateSection.model_fields["engine"].annotation))
    assert choices(plan) == choices(measure) == list(planned())
    for name, engine in ENGINES.items():
        assert engine.facts.name == name
        assert len({kind.name for kind in engine.facts.cache_types}) == len(engine.facts.cache_types)


# A benchmark: a sentence asks for an expression of x, and pairs of numbers judge it.


def read(where: str, row: Row) -> Problem:
    test = "def check(candidate):\n    for given, right in PAIRS:\n        assert candidate(given) == right\n"
    return problem(
        where,
        {
            "task_id": text_of(where, row, "sentence"),
            "prompt": row["sentence"],
            "instruction": f"{row['sentence']} Answer with the expression alone.",
            "entry_point": "f",
            "canonical_solution": "",
            "test": f"PAIRS = {row['pairs']!r}\n\n\n{test}",
            "format": "expressions",
            "stop": ("\n",),
        },
    )


def program(problem: Problem, text: str) -> str:
    return f"def f(x):\n    return {text.strip()}\n"


EXPRESSIONS = Benchmark(
    format="expressions",
    data_sets={"expressions": DataSet("toys/expressions", "0" * 40, ("all.jsonl",), 2, "MIT", "expressions.jsonl")},
    read=read,
    recognizes=lambda row: {"sentence", "pairs"} <= set(row),
    from_text=program,
    from_reply=program,
)


@pytest.mark.parametrize("style", ["completion", "chat"])
def test_a_benchmark_is_loaded_asked_and_judged(style: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHMARKS, "expressions", EXPRESSIONS)
    rows = [{"sentence": "One more than x.", "pairs": [[1, 2], [5, 6]]}, {"sentence": "Twice x.", "pairs": [[3, 6]]}]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task("expressions", file=str(file))
    assert task.problems == load_task(str(file)).problems  # known by its rows
    found = answer_task(ToyModel(), task, Asking(style, Decoding(8, 2)), None, Journal.open(tmp_path / "j.jsonl"))
    assert {name: outcome.outcome for name, (outcome,) in found.items()} == {
        "One more than x.": "passed", "Twice x.": "failed",
    }  # fmt: skip
