"""Tasks by name or file: loaded, checked, narrowed; and a problem with an answer as a job for the sandbox.

Shipped tasks are files in HumanEval's JSONL format with a ``level`` (1 a one-liner, 5 a small algorithm). Benchmarks
come from their data set at a pinned commit (see fetching) or from a local file in their published format.
"""

import datetime
import importlib.resources
import importlib.util
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from qtool import QtoolError
from qtool.convert.files.reading import named
from qtool.evaluate.sandbox.execute import Job
from qtool.evaluate.tasks.benchmark import Benchmark
from qtool.evaluate.tasks.fetching import fetch
from qtool.evaluate.tasks.made import CHARACTERS, Making, by_characters
from qtool.evaluate.tasks.problems import Problem, Task
from qtool.evaluate.tasks.rows import Row, parse_rows, read_rows
from qtool.evaluate.tasks.table import BENCHMARKS, benchmark_of, data_sets, dated, made, recognized

__all__ = ["SHIPPED", "Problem", "Task", "as_job", "load_task", "subset"]

SHIPPED = {"handwritten": "handwritten.jsonl", "heldout": "heldout.jsonl.gz"}


def load_task(
    name_or_path: str,
    *,
    file: str | None = None,
    revision: str | None = None,
    after: datetime.date | None = None,
    before: datetime.date | None = None,
    making: Making | None = None,
) -> Task:
    """The task of that name, or the problems of that file (its rows say which benchmark's format it is).

    ``file`` is a local copy of a named benchmark, ``revision`` a commit of its data set other than the pinned one.
    ``making``: how a task is made whose problems are in no file (None: as usual).
    ``after`` and ``before`` (inclusive) keep problems whose contest was in that window: LiveCodeBench alone has dates.
    Problems that need what this machine lacks are left out, and listed in the task with the reason.
    Raises QtoolError: exit 2 for a missing, empty or malformed file (naming line and key), exit 3 for a benchmark that
    is not on this machine and cannot be fetched.
    """
    known = data_sets()
    if name_or_path in made():
        _refuse_extras(name_or_path, file, revision)
        if after is not None or before is not None:
            raise QtoolError(f"task {name_or_path!r} has no contest dates; {_for_dated()}.")
        return _made(name_or_path, making or Making())
    if name_or_path in SHIPPED or (name_or_path not in known and (file or revision)):
        _refuse_extras(name_or_path, file, revision)
    if name_or_path in SHIPPED:
        rows = parse_rows(SHIPPED[name_or_path], _shipped(name_or_path))
        return _task(name_or_path, "shipped with qtool", rows, BENCHMARKS["humaneval"], after, before)
    if name_or_path not in known:
        path = _existing(name_or_path, named(name_or_path))
        return _task(_stem(path), str(path), read_rows(path), None, after, before)
    benchmark, data_set = known[name_or_path]
    if benchmark.day is None and (after is not None or before is not None):
        raise QtoolError(f"task {name_or_path!r} has no contest dates; {_for_dated()}.")
    if file is not None:
        path = _existing(name_or_path, named(file))
        return _task(name_or_path, str(path), read_rows(path), benchmark, after, before)
    if revision is None and (installed := benchmark.installed(name_or_path)) is not None:
        return _task(name_or_path, str(installed), read_rows(installed), benchmark, after, before)
    paths, source = fetch(name_or_path, revision)
    rows = (row for path in paths for row in read_rows(path))
    return _task(name_or_path, source, rows, benchmark, after, before, None if revision else data_set.problems)


def _made(name: str, making: Making) -> Task:
    make = BENCHMARKS[name].make
    assert make is not None
    counted = f", a token counted as {CHARACTERS} characters" if making.count is by_characters else ""
    lengths = ", ".join(f"{length:,}" for length in making.lengths)
    return Task(name=name, problems=tuple(make(making)), source=f"made by qtool: {lengths} tokens{counted}")


def as_job(problem: Problem, program: str) -> Job:
    """``program`` (see prompts.program) as the sandbox judges it by the problem's own test."""
    return Job(
        problem.task_id,
        program,
        problem.test,
        problem.entry_point,
        setup=problem.prompt if benchmark_of(problem).prompt_in_test else "",
        run=problem.run,
        language=problem.language,
        libraries=problem.libraries,
        seconds=problem.seconds,
        call_seconds=problem.call_seconds,
    )


def subset(task: Task, limit: int | None, seed: int | None = None) -> Task:
    """At most ``limit`` problems of ``task``, each level keeping its share; the file's order is kept.

    Without ``seed`` the picks are evenly spaced inside a level; with it they are drawn at random. Either way
    the same arguments give the same problems. ``limit=None`` is the whole task.
    """
    if limit is None or limit >= len(task.problems):
        return task
    if limit < 1:
        raise QtoolError(f"limit must be at least 1, got {limit}: a task without problems cannot be scored.")
    strata: dict[int | None, list[int]] = {}
    for index, problem in enumerate(task.problems):
        strata.setdefault(problem.level, []).append(index)
    total = len(task.problems)
    exact = {level: limit * len(members) / total for level, members in strata.items()}
    share = {level: int(value) for level, value in exact.items()}
    # Largest remainders get what rounding down left over; ties go to the level that comes first in the file.
    by_remainder = sorted(exact, key=lambda level: share[level] - exact[level])
    for level in by_remainder[: limit - sum(share.values())]:
        share[level] += 1
    chosen: list[int] = []
    generator = None if seed is None else random.Random(seed)
    for level, members in strata.items():
        count = share[level]
        if generator is not None:
            chosen += generator.sample(members, count)
        else:
            chosen += [members[i * len(members) // count] for i in range(count)]
    suffix = f"[{limit}]" if seed is None else f"[{limit}, seed {seed}]"
    problems = tuple(task.problems[i] for i in sorted(chosen))
    return Task(name=task.name + suffix, problems=problems, source=task.source, left_out=task.left_out)


def _refuse_extras(name: str, file: str | None, revision: str | None) -> None:
    if file is not None or revision is not None:
        key = "file" if file is not None else "revision"
        raise QtoolError(
            f"task {name!r}: `{key}` is for the benchmarks {', '.join(data_sets())}. A file of your own is itself the "
            "task."
        )


def _existing(name: str, path: Path) -> Path:
    if path.is_file():
        return path
    known = ", ".join([*SHIPPED, *data_sets(), *made()])
    what = "is a folder, not a file" if path.is_dir() else "is neither a known task nor a file"
    if name != str(path):
        what = f"({path}) {what}"
    raise QtoolError(
        f"task {name!r} {what}. Name one of {known}, or give the path of a .jsonl, .jsonl.gz, .json or .parquet file "
        "in the format of one of them."
    )


def _stem(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return next((name.removesuffix(end) for end in (".jsonl", ".json", ".parquet") if name.endswith(end)), name)


def task_sizes() -> dict[str, int]:
    """Name -> number of problems of every task that has a name; of benchmarks as published."""
    own = {name: sum(1 for _ in parse_rows(SHIPPED[name], _shipped(name))) for name in SHIPPED}
    own |= {name: data_set.problems for name, (_, data_set) in data_sets().items()}
    return own | dict.fromkeys(made(), Making().problems)


def _shipped(name: str) -> bytes:
    resource = importlib.resources.files("qtool.evaluate").joinpath(f"data/{SHIPPED[name]}")
    if not resource.is_file():
        raise QtoolError(
            f"task {name!r}: its file {SHIPPED[name]} is missing from this installation. Install qtool-llm again.",
            exit_code=3,
        )
    return resource.read_bytes()


def _task(
    name: str,
    source: str,
    rows: Iterable[tuple[str, Row]],
    benchmark: Benchmark | None,
    after: datetime.date | None,
    before: datetime.date | None,
    expected: int | None = None,
) -> Task:
    """The problems of ``rows``. ``expected``: how many the pinned data set has; fewer are half a download."""
    problems: list[Problem] = []
    left_out: dict[str, str] = {}
    seen: dict[str, str] = {}
    for where, problem in _problems(rows, benchmark, after, before):
        if problem is None:
            seen[where] = where
            continue
        if problem.task_id in seen:
            raise QtoolError(
                f"{where}: task_id {problem.task_id!r} was already used on line "
                f"{seen[problem.task_id].rpartition(':')[2]}. Outcomes are paired by task_id: make them unique."
            )
        seen[problem.task_id] = where
        missing = [library for library in problem.libraries if not _importable(library)]
        if missing:
            left_out[problem.task_id] = f"needs {', '.join(missing)}, not installed here"
        else:
            problems.append(problem)
    if expected is not None and len(seen) < expected:
        raise QtoolError(
            f"task {name!r}: {len(seen)} of {expected} problems are in the local cache: an earlier download of "
            f"{source} was broken off. Run it again with a network.",
            exit_code=3,
        )
    if not problems:
        raise QtoolError(f"{source}: no problems in it{_why_none(left_out, len(seen), after, before)}.")
    return Task(name=_windowed(name, after, before), problems=tuple(problems), source=source, left_out=left_out)


def _problems(
    rows: Iterable[tuple[str, Row]], benchmark: Benchmark | None, after: datetime.date | None,
    before: datetime.date | None,
) -> Iterator[tuple[str, Problem | None]]:  # fmt: skip
    """(place, problem) of each row that belongs to the task; None for one outside the window of dates."""
    for where, row in rows:
        found = benchmark or recognized(row)
        if after is not None or before is not None:
            if found.day is None:
                raise QtoolError(f"{where}: no contest date; {_for_dated()}.")
            day = found.day(where, row)
            if (after is not None and day < after) or (before is not None and day > before):
                yield where, None
                continue
        problem = found.read(where, row)
        if problem is not None:
            yield where, problem


def _for_dated() -> str:
    return f"`after` and `before` are for {', '.join(dated())}"


def _why_none(left_out: dict[str, str], seen: int, after: datetime.date | None, before: datetime.date | None) -> str:
    if left_out:
        name, reason = next(iter(left_out.items()))
        return f" that this machine can run: all {len(left_out)} are left out (first {name}: {reason})"
    if seen and (after is not None or before is not None):
        return f" from {after or 'the first'} to {before or 'the last'} ({seen} are outside)"
    return ". A task needs at least one JSON object, one a line (of MBPP, problems 11 to 510)"


def _windowed(name: str, after: datetime.date | None, before: datetime.date | None) -> str:
    return f"{name}[{after or ''}..{before or ''}]" if after is not None or before is not None else name


def _importable(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except (ImportError, ValueError):
        return False
