"""BigCodeBench: functions that use libraries, judged by a unittest.

Source: Zhuo et al. 2024, arXiv:2406.15877, https://github.com/bigcode-project/bigcodebench.
"""

from __future__ import annotations

from qtool.evaluate.tasks.benchmark import Benchmark, DataSet
from qtool.evaluate.tasks.evalplus import ASK, STOP_ALWAYS
from qtool.evaluate.tasks.extract import program_from_chat, without_examples
from qtool.evaluate.tasks.humaneval import finished
from qtool.evaluate.tasks.humaneval import from_text as completed_function
from qtool.evaluate.tasks.problems import Problem
from qtool.evaluate.tasks.rows import Row, problem, text_of, third_party

# It allows 240 s; an endless loop in every tenth answer would then take hours.
SECONDS = 60.0


def read(where: str, row: Row) -> Problem:
    """BigCodeBench: ``complete_prompt`` for base models, ``instruct_prompt`` for chat, a unittest as the test."""
    begun, solution = text_of(where, row, "code_prompt"), text_of(where, row, "canonical_solution")
    test = text_of(where, row, "test")
    return problem(
        where,
        {
            "task_id": text_of(where, row, "task_id"),
            "prompt": text_of(where, row, "complete_prompt"),
            "instruction": f"{ASK}\n{text_of(where, row, 'instruct_prompt').strip()}\n",
            "entry_point": text_of(where, row, "entry_point"),
            "canonical_solution": solution if solution.startswith("\n") else "\n" + solution,
            "test": test,
            "format": "bigcodebench",
            "run": "in_process",
            "stop": (*STOP_ALWAYS, "\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert "),
            # Put above every answer, as the published "calibrated" scores do: chat models forget the imports.
            "setup": begun.rstrip() + "\n    pass\n",
            "libraries": third_party([begun + solution, test]),
            "seconds": SECONDS,
        },
    )


def from_text(problem: Problem, text: str) -> str:
    """The prompt's function, below the imports."""
    return f"{problem.setup}\n{completed_function(problem, text)}"


def from_reply(problem: Problem, text: str) -> str:
    """The reply's function, below the imports."""
    made = program_from_chat(text, problem.setup, problem.entry_point)
    return f"{problem.setup}\n{without_examples(made) if problem.instruction else made}"


BENCHMARK = Benchmark(
    format="bigcodebench",
    data_sets={
        "bigcodebench": DataSet(
            "bigcode/bigcodebench",
            "b74c0d0bf70d2c0bc459be537895cca163007f1a",
            ("data/v0.1.4-*.parquet",),
            1140,
            "Apache-2.0",
            "BigCodeBench-v0.1.4.jsonl",
        ),
    },
    read=read,
    recognizes=lambda row: {"complete_prompt", "instruct_prompt"} <= set(row),
    finished=finished,
    from_text=from_text,
    from_reply=from_reply,
)
