"""`import qtool`: six verbs, each with an example that runs, and light until one is called."""

from __future__ import annotations

import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qtool
from qtool import QtoolError

VERBS = ("plan", "convert", "open", "verify", "score", "judge")
PAGE = Path(__file__).parent.parent / "docs" / "python.md"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run, one after the other."""
    return tmp_path_factory.mktemp("python")


def run_example(text: str, name: str) -> int:
    """Run a doctest with nothing but qtool imported; the number of its lines."""
    test = doctest.DocTestParser().get_doctest(text, {"qtool": qtool}, name, None, 0)
    said: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(
        test, out=said.append
    )
    assert results.failed == 0, "".join(said)
    return results.attempted


@pytest.mark.slow
def test_every_verb_has_an_example_that_runs(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    for verb in VERBS:
        text = inspect.getdoc(getattr(qtool, verb))
        assert run_example(text or "", verb) >= 1, verb


@pytest.mark.slow
def test_the_page_runs_as_it_is_printed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    page = PAGE.read_text(encoding="utf-8")
    assert run_example(page.replace("```", ""), "docs/python.md") > 8
    assert [verb for verb in VERBS if f"qtool.{verb}(" not in page] == []


def test_importing_is_light_and_the_verbs_are_there() -> None:
    """Not even pydantic: what `import qtool` and `qtool --help` cost is click."""
    heavy = ("torch", "numpy", "transformers", "pydantic", "rich", "huggingface_hub")
    code = (
        "import sys, qtool\n"
        f"assert all(callable(getattr(qtool, verb)) for verb in {VERBS})\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_verb_stays_one_where_a_module_has_its_name() -> None:
    module: Any = importlib.import_module("qtool.convert")
    importlib.import_module("qtool.convert.artifact")
    assert module.artifact.Artifact
    assert callable(qtool.convert)
    assert callable(qtool.plan)
    assert "outputs" in inspect.signature(qtool.convert).parameters
    assert "RTX4090" in (qtool.plan.__doc__ or "")
    assert qtool.plan("qtool-demo", gpu="RTX4090").answers
    with pytest.raises(QtoolError, match="no such method"):
        qtool.convert("qtool-demo", ["awk"])


def test_faults_are_said_as_a_recipe_says_them() -> None:
    with pytest.raises(QtoolError, match=r"outputs\[0\]\.bitz: unknown key; did you mean 'bits'"):
        qtool.convert("qtool-demo", [{"method": "awq", "bitz": 4}], "qtool-code")
    with pytest.raises(QtoolError, match="nothing to measure"):
        qtool.score("qtool-demo")
    with pytest.raises(QtoolError, match="sampels: unknown key; did you mean 'samples'"):
        qtool.score("qtool-demo", tasks=["handwritten"], sampels=3)
    with pytest.raises(QtoolError, match="no such folder"):
        qtool.open("nowhere")


def test_judge_knows_a_measured_size_and_refuses_a_gate_of_nothing(work: Path) -> None:
    from qtool.runs.summary import ModelSummary, Size, Summary

    models = {"source": ModelSummary(size=Size(4, 16.0)), "awq": ModelSummary(size=Size(1, 4.0, 2_000_000))}
    summary = Summary(models=models, comparisons=0, evidence="")
    asked = [{"max_size": 0.001}, {"max_size": 0.003}, {"min_bits_saved": 11}]
    assert [result.verdict for result in qtool.judge(summary, asked)] == ["fail", "pass", "pass"]
    with pytest.raises(QtoolError, match=r"gates\[1\]: a gate states exactly one"):
        qtool.judge(summary, [{"max_kld": 1.0}, {}])
