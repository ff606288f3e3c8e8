"""MultiPL-E: HumanEval in other languages, of which qtool runs JavaScript (with node) and Python.

Source: Cassano et al. 2022, arXiv:2208.08227, https://github.com/nuprl/MultiPL-E.
"""

from __future__ import annotations

import re

from qtool import QtoolError
from qtool.evaluate.tasks.benchmark import Benchmark, DataSet, python_in_reply
from qtool.evaluate.tasks.extract_javascript import program_from_javascript_chat
from qtool.evaluate.tasks.problems import Problem
from qtool.evaluate.tasks.rows import Row, problem, text_of, texts_of

_LANGUAGES = {"js": "javascript", "py": "python"}


def read(where: str, row: Row) -> Problem:
    """MultiPL-E in JavaScript (and in Python): the row brings its own stop sequences and publishes no solution."""
    language = _LANGUAGES.get(text_of(where, row, "language"))
    if language is None:
        raise QtoolError(f"{where}: language {row['language']!r}; qtool runs MultiPL-E's js (with node) and py.")
    tests, name = text_of(where, row, "tests"), text_of(where, row, "name")
    found = re.search(r"candidate\s*=\s*([\w$]+)|check\(([\w$]+)\)\s*$", tests, re.MULTILINE)
    stem = re.fullmatch(r"[A-Za-z]+_\d+_(.+)", name)
    if found is None and stem is None:
        raise QtoolError(f"{where}: neither 'tests' nor 'name' says which function is asked for.")
    return problem(
        where,
        {
            "task_id": name,
            "prompt": text_of(where, row, "prompt"),
            "entry_point": (found[1] or found[2]) if found else stem[1] if stem else "",
            "canonical_solution": "",
            "test": tests,
            "format": "multipl-e",
            "language": language,
            "stop": tuple(texts_of(where, row, "stop_tokens")),
        },
    )


def from_reply(problem: Problem, text: str) -> str:
    """The program in a reply, of the problem's language."""
    if problem.language == "javascript":
        return program_from_javascript_chat(text, problem.prompt, problem.entry_point)
    return python_in_reply(problem, text)


BENCHMARK = Benchmark(
    format="multipl-e",
    data_sets={
        "multipl-e-js": DataSet(
            "nuprl/MultiPL-E",
            "28441b6024e71d4a1c1c0f6bf171c935cd5a43f2",
            ("humaneval-js/test-*.parquet",),
            161,
            "MIT",
            "humaneval-js-reworded.jsonl",
        ),
    },
    read=read,
    recognizes=lambda row: {"tests", "stop_tokens"} <= set(row),
    from_reply=from_reply,
)
