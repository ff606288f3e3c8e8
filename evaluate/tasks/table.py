"""The benchmarks that qtool knows. To add one: its module, and its row here."""

from __future__ import annotations

from qtool.evaluate.tasks import (
    bigcodebench,
    humaneval,
    livecodebench,
    long_call,
    long_change,
    long_combine,
    mbpp,
    multipl_e,
)
from qtool.evaluate.tasks.benchmark import Benchmark, DataSet
from qtool.evaluate.tasks.problems import Problem
from qtool.evaluate.tasks.rows import Row

BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.format: module.BENCHMARK
    for module in (humaneval, mbpp, bigcodebench, livecodebench, multipl_e, long_call, long_combine, long_change)
}


def data_sets() -> dict[str, tuple[Benchmark, DataSet]]:
    """Name of a task -> its benchmark and where its rows lie."""
    return {
        name: (benchmark, data_set)
        for benchmark in BENCHMARKS.values()
        for name, data_set in benchmark.data_sets.items()
    }


def made() -> dict[str, Benchmark]:
    """Name of a task -> the benchmark that makes its problems."""
    return {name: benchmark for name, benchmark in BENCHMARKS.items() if benchmark.make is not None}


def benchmark_of(problem: Problem) -> Benchmark:
    """The one whose format the problem has."""
    return BENCHMARKS[problem.format]


def recognized(row: Row) -> Benchmark:
    """The one that recognizes a row of a file; else the first, whose keys are those that problems have."""
    first = next(iter(BENCHMARKS.values()))
    return next((benchmark for benchmark in BENCHMARKS.values() if benchmark.recognizes(row)), first)


def dated() -> list[str]:
    """The tasks whose problems have days."""
    return [name for name, (benchmark, _) in data_sets().items() if benchmark.day is not None]


def is_dated(task: str) -> bool:
    """Whether a window of contest dates can apply: to a task with days, and to a file, which may be of one."""
    return task in dated() if task in data_sets() else "." in task
