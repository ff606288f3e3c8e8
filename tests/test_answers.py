"""Answering a task: the journal outlives a kill, known answers find a broken harness, engines say what they lack."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.skeleton import load_config
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.evaluate import answers, selfcheck
from qtool.evaluate.answers import Asking, answer_task
from qtool.evaluate.engines import transformers, vllm, vllm_model
from qtool.evaluate.engines.decoding import end_tokens
from qtool.evaluate.engines.engine import Completion, Decoding, Request, sample_seed
from qtool.evaluate.engines.torch_model import TorchModel, load_model
from qtool.evaluate.engines.transformers import load_native
from qtool.evaluate.journal import Journal
from qtool.evaluate.sandbox.execute import Job, Outcome
from qtool.evaluate.scorecard import ProblemOutcome
from qtool.evaluate.tasks import prompts
from qtool.evaluate.tasks.loading import load_task, subset
from qtool.evaluate.tasks.problems import Problem, Task

ASKING = Asking("completion", Decoding(64, 4))


@dataclass
class Scripted:
    """Right answers to every problem; counts what it was asked."""

    task: Task
    name: str = "scripted"
    version: str = ""
    dtype: str = ""
    device: str = ""
    asked: list[int] = field(default_factory=list)

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[Completion]:
        for index, request in enumerate(requests):
            if index not in done:
                self.asked.append(index)
                yield index, next(p.canonical_solution for p in self.task.problems if p.prompt == request.prompt)


def test_samples_are_kept_and_judged(tmp_path: Path) -> None:
    task = subset(load_task("handwritten"), 5)
    asking = Asking("completion", Decoding(64, 4, temperature=0.5), samples=3)
    found = answer_task(Scripted(task), task, asking, None, Journal.open(tmp_path / "j.jsonl"))
    assert [len(outcomes) for outcomes in found.values()] == [3] * 5
    assert {outcome.outcome for outcomes in found.values() for outcome in outcomes} == {"passed"}
    seeds = {sample_seed(0, problem, n) for problem in found for n in range(3)}
    assert len(seeds) == 15
    assert max(seeds) < 2**31


def test_equal_programs_of_a_problem_are_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two models that write the same, the second's programs are not run again; another problem's, one that timed out
    and those of another test are."""
    ran: list[str] = []
    task = subset(load_task("handwritten"), 3)
    names = [problem.task_id for problem in task.problems]

    def judged(jobs: Sequence[Job], *, timeout: float, sandbox: str) -> list[Outcome]:
        ran.extend(job.task_id for job in jobs)
        return [Outcome(job.task_id, "timeout" if job.task_id == names[2] else "passed") for job in jobs]

    monkeypatch.setattr(answers, "run_programs", judged)
    asking = Asking("completion", Decoding(64, 4), samples=2)

    def outcomes(task: Task, name: str) -> list[list[str]]:
        found = answer_task(Scripted(task), task, asking, None, Journal.open(tmp_path / name))
        return [[outcome.outcome for outcome in each] for each in found.values()]

    expected = [["passed"] * 2, ["passed"] * 2, ["timeout"] * 2]
    assert outcomes(task, "a") == expected
    assert set(ran) == set(names)
    ran.clear()
    assert outcomes(task, "b") == expected
    assert set(ran) == {names[2]}
    ran.clear()
    other = task.problems[0].model_copy(update={"test": task.problems[0].test + "# another\n"})
    outcomes(Task(name="other", problems=(other,)), "c")
    assert set(ran) == {names[0]}


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """A process that answers one problem in 50 ms is killed; the next asks only for the rest."""
    path = tmp_path / "j.jsonl"
    code = (
        "import sys, time\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_answers import *\n"
        "task = subset(load_task('handwritten'), 40)\n"
        "class Slow(Scripted):\n"
        "    def generate(self, *a):\n"
        "        for found in super().generate(*a):\n"
        "            time.sleep(0.05)\n"
        "            yield found\n"
        "answer_task(Slow(task), task, ASKING, None, Journal.open(Path(sys.argv[2])))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(path)])
    while not path.exists() or path.read_bytes().count(b'"outcome"') < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with path.open("ab") as file:
        file.write(b'{"problem": "handwritten/1", "sam')  # the line that the kill tore
    task = subset(load_task("handwritten"), 40)
    journal = Journal.open(path)
    known = len(journal.judged) + len(journal.texts)
    assert 5 <= known < 40
    engine = Scripted(task)
    found = answer_task(engine, task, ASKING, None, journal)
    assert len(engine.asked) == 40 - known
    assert [outcome.outcome for (outcome,) in found.values()] == ["passed"] * 40
    again = Journal.open(path)
    assert len(again.judged) == 40
    assert not again.texts


def test_a_test_that_cannot_run_here_is_no_outcome(tmp_path: Path) -> None:
    """A test that is not Python can judge nothing: no score, and the answer is judged again next time."""
    problem = load_task("handwritten").problems[0]
    task = Task(name="broken", problems=(problem.model_copy(update={"test": "def check(:"}),))
    path = tmp_path / "j.jsonl"
    with pytest.raises(QtoolError, match="running again gives the same") as caught:
        answer_task(Scripted(task), task, ASKING, None, Journal.open(path))
    assert caught.value.exit_code == 2
    assert len(Journal.open(path).texts) == 1


def test_lines_of_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.answered(("a", 0), "    return 1\n")
    journal.answered(("b", 0), "    return \u2028 2\n")
    journal.add([(("a", 0), ProblemOutcome(outcome="failed", detail="d", completion="    return 1\n"))])
    found = Journal.open(tmp_path / "j.jsonl")
    assert found.texts == {("b", 0): "    return \u2028 2\n"}
    assert found.judged[("a", 0)].outcome == "failed"
    found.close()
    assert not found.path.exists()


def check(task: Task, style: prompts.Style, folder: Path) -> selfcheck.SelfCheck:
    return selfcheck.check_task(task, Asking(style, Decoding(64, 4), samples=3), None, "here", folder / "check")


@pytest.mark.slow
@pytest.mark.parametrize("style", ["completion", "chat"])
def test_a_sound_harness_passes_its_self_check(style: prompts.Style, tmp_path: Path) -> None:
    found = check(load_task("handwritten"), style, tmp_path)
    assert (found.right, found.wrong, found.unchecked, found.faults) == (73, 146, [], {})
    found.require()
    assert not list(tmp_path.iterdir())


def changed(**changes: str) -> Task:
    return Task(name="t", problems=(load_task("handwritten").problems[0].model_copy(update=changes),))


def test_a_test_that_passes_everything_is_found(tmp_path: Path) -> None:
    task = changed(test="def check(candidate):\n    try:\n        candidate()\n    except Exception:\n        pass\n")
    found = check(task, "completion", tmp_path)
    assert list(found.faults.values()) == ["a wrong answer (altered) passed"]
    with pytest.raises(QtoolError, match=r"the self-check failed on 1 problems, so no model is scored: .*altered") as e:
        found.require()
    assert e.value.exit_code == 3


@pytest.mark.slow
def test_a_broken_stop_rule_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers cut too early: what a model pays for, no test of the extraction alone would show."""
    monkeypatch.setattr(prompts, "finished", lambda text, *_: len(text) > 24)
    found = check(subset(load_task("handwritten"), 20), "completion", tmp_path)
    assert len(found.faults) > 10
    assert "the published solution failed" in next(iter(found.faults.values()))


def test_problems_without_a_solution_are_not_checked(tmp_path: Path) -> None:
    found = check(changed(canonical_solution=""), "completion", tmp_path)
    assert (found.right, found.wrong, len(found.unchecked)) == (0, 0, 1)
    found.require()


TRICKY = [
    "    items.sort()\n",  # works on its argument and returns nothing
    "    return sum(f(items[1:], k) for _ in items[:1]) + 1\n",  # calls itself
    "    yield from items\n",
    "    return float('inf')\n",
    "    return True\n",
]
TESTS = [
    "xs = [3, 1]\n    candidate(xs)\n    assert xs == [1, 3]", "assert candidate([1, 2]) == 3",
    "assert list(candidate([1, 2])) == [1, 2]", "assert candidate([]) == float('inf')", "assert candidate([])",
]  # fmt: skip


@pytest.mark.parametrize("style", ["completion", "chat"])
def test_mutants_are_wrong_whatever_the_function_does(style: prompts.Style, tmp_path: Path) -> None:
    problems = tuple(
        Problem(
            task_id=f"t/{n}", prompt='def f(items, k=1, *rest, last=None, **more):\n    """Do."""\n', entry_point="f",
            canonical_solution=body, test=f"def check(candidate):\n    {test}\n",
        )
        for n, (body, test) in enumerate(zip(TRICKY, TESTS, strict=True))
    )  # fmt: skip
    assert check(Task(name="t", problems=problems), style, tmp_path).faults == {}


@pytest.mark.slow
def test_a_harness_that_fails_scores_nothing(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from qtool.cli import main

    path = tmp_path / "task.jsonl"
    problem = changed(test="def check(candidate):\n    assert candidate([]) is candidate\n").problems[0]
    path.write_text(problem.model_dump_json() + "\n")
    arguments = ["evaluate", "qtool-demo-is-not-read", "--self-check", "--task", str(path), "--runs", str(tmp_path)]
    result = CliRunner().invoke(main, [*arguments[:1], *arguments[2:]])
    assert result.exit_code == 3
    assert "the self-check failed on 1 problems" in result.output
    arguments = ["evaluate", "--self-check", "--task", "handwritten", "--limit", "9", "--runs", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "9 published solutions passed, 18 wrong answers failed" in result.output
    assert len(list((tmp_path / "selfchecks").glob("*.json"))) == 1


FULL_DISK = """
import resource, sys
from pathlib import Path
from qtool.evaluate.journal import Journal
from qtool.evaluate.sandbox.execute import Job, Outcome
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
journal = Journal(Path(sys.argv[1]))
journal.answered(("a", 0), "x" * 100)
try:
    journal.answered(("b", 0), "x" * 1000)
except OSError:
    print(list(journal.texts))
"""


def test_an_answer_that_could_not_be_written_is_not_taken_for_kept(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "j.jsonl"], capture_output=True, text=True, check=True
    )
    assert said.stdout == "[('a', 0)]\n"
    assert list(Journal.open(tmp_path / "j.jsonl").texts) == [("a", 0)]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_prompt_is_split_as_the_tokenizer_would(scheme: str) -> None:
    """SentencePiece puts a space before a text, but some tokenizers none behind a BOS that is spelled out."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "\u2581", "d", "e", "f", "\u2581d"]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({name: n for n, name in enumerate(names)}, [("\u2581", "d")], unk_token="<unk>")
    )
    # tokenizers types these attributes too narrowly
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)  # type: ignore[assignment]
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])  # type: ignore[assignment]
    made.add_special_tokens(["<s>", "<unk>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")
    problem = changed(prompt="def f").problems[0]
    text = prompts.render(problem, "completion", tokenizer)
    assert tokenizer(text, add_special_tokens=False).input_ids == tokenizer(problem.prompt).input_ids


def test_an_answer_ends_where_the_models_generation_config_says(tiny: Path, tmp_path: Path) -> None:
    """Chat models often name the end of a turn there alone."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 11]}))
    loaded = load_model(Checkpoint.open(model).read(), load_config(model), torch.device("cpu"))
    assert {7, 11} < end_tokens(loaded, load_tokenizer(model))
    (model / "generation_config.json").write_text("{")
    with pytest.raises(QtoolError, match=r"generation_config\.json"):
        load_model(Checkpoint.open(model).read(), load_config(model), torch.device("cpu"))


def test_native_engine_says_what_it_lacks(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match="needs gptqmodel for gptq, which is not installed here") as caught:
        load_native(tmp_path, torch.device("cpu"))
    assert caught.value.exit_code == 3
    (tmp_path / "model.gguf").touch()
    with pytest.raises(QtoolError, match="runs safetensors only"):
        load_native(tmp_path, torch.device("cpu"))


@pytest.mark.slow
def test_native_engine_runs_bitsandbytes_kernels(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The kernels' own answers on the CPU are close to the dequantized ones, and are not the same arithmetic."""
    from qtool.run import run

    made = run(write_recipe(outputs=[{"method": "nf4"}]), tmp_path / "runs", "cpu")
    (folder,) = made.folders.values()
    model = load_native(folder, torch.device("cpu"))
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())

    engine = TorchModel(transformers.FACTS, model, load_tokenizer(folder))
    found = dict(engine.generate([Request("def f1(a, b):\n", lambda _: False)], Decoding(8, 1)))
    assert found[0]
    assert "bitsandbytes" in engine.version


class FakeSamplingParams:
    def __init__(self, **options: Any) -> None:
        self.options = options


class FakeLLM:
    """vLLM 0.33's `LLM` as its documentation shows it: dicts of token ids in, `outputs[0].text` out, in order."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(dtype=torch.float16))
        self.calls: list[tuple[Any, Any]] = []

    def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
        self.calls.append((prompts, [p.options for p in params]))
        said = [types.SimpleNamespace(text=f"answer to {len(p['prompt_token_ids'])} tokens") for p in prompts]
        return [types.SimpleNamespace(outputs=[answer]) for answer in said]


def test_vllm_is_called_as_documented(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QtoolError, match="engine vllm needs vLLM, which is not here") as caught:
        vllm_model.load(vllm.FACTS, tiny, None, 64)
    assert caught.value.exit_code == 3
    fake = types.ModuleType("vllm")
    fake.__dict__.update(LLM=FakeLLM, SamplingParams=FakeSamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    tokenizer = load_tokenizer(tiny)
    engine = vllm_model.load(vllm.FACTS, tiny, tokenizer, 64)
    assert engine.llm.options["max_model_len"] == 64
    assert engine.dtype == "float16"
    texts = ["def f1(a, b):\n", "x", "y", "def"]
    requests = [Request(text, lambda _: False, seed=5) for text in texts]
    found = dict(engine.generate(requests, Decoding(8, 2), done={1}))
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    assert found == {index: f"answer to {lengths[index]} tokens" for index in (0, 2, 3)}
    assert [len(prompts) for prompts, _ in engine.llm.calls] == [2, 1]
    greedy = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 8, "seed": None, "skip_special_tokens": True}
    assert engine.llm.calls[0][1] == [greedy, greedy]


@pytest.mark.parametrize("solution", ["    return " + "(" * 5000 + "1" + ")" * 5000 + "\n", "    return 1 +\n"])
def test_a_published_solution_that_is_no_python_is_named(solution: str, tmp_path: Path) -> None:
    problem = load_task("heldout").problems[0].model_copy(update={"canonical_solution": solution})
    found = check(Task(name="t", problems=(problem,)), "completion", tmp_path)
    assert found.faults == {problem.task_id: "the published solution is no Python"}
