"""A coding problem and a task of them, whatever benchmark they come from."""

import hashlib
import json
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Run = Literal["call", "stdin", "in_process"]

# What a digest has covered from the first version on; later fields count only where they say something.
_ALWAYS = frozenset({"task_id", "prompt", "entry_point", "canonical_solution", "test", "level"})


# What says how problems differ changes nothing that is asked or judged.
_ABOUT = frozenset({"difficulty", "category"})


def _word(value: Any) -> Any:
    """Files have such keys of other kinds, too: what is no word or number says nothing."""
    return (
        str(value)
        if isinstance(value, int) and not isinstance(value, bool)
        else value
        if isinstance(value, str)
        else ""
    )


Word = Annotated[str, BeforeValidator(_word)]


class Problem(BaseModel):
    """One problem. ``prompt + canonical_solution`` is a program where the benchmark publishes one; else it is "".

    ``test`` is Python or JavaScript that defines ``check(candidate)``, asserts on ``entry_point``, or holds a unittest
    ``TestCases``. ``run`` says how it is judged: ``call`` (the test calls the program over a pipe), ``stdin`` (the
    program is a script: the test calls it with its input and gets what it printed), ``in_process`` (program and test
    share one process: such a program could cheat its own test). ``instruction`` is the text for a chat model where the
    benchmark publishes one, ``stop`` its stop sequences for a base model, ``setup`` trusted code that the test needs.
    """

    # Published files carry keys of their own (contract, doctests, ...): here extra keys are no error.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    task_id: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    entry_point: str = Field(pattern=r"^[A-Za-z_$][A-Za-z0-9_$]*$")
    canonical_solution: str
    test: str = Field(min_length=1)
    level: int | None = Field(default=None, ge=1)
    format: str = "humaneval"  # of the benchmark (table.BENCHMARKS) whose rules answers follow
    language: Literal["python", "javascript"] = "python"
    run: Run = "call"
    instruction: str = ""
    stop: tuple[str, ...] = ()
    setup: str = ""
    libraries: tuple[str, ...] = ()  # importable modules beyond the standard library
    seconds: float | None = None  # the benchmark's own time limit, where it is above the usual
    call_seconds: float | None = None  # and for one call of the program
    difficulty: Word = ""  # as the benchmark calls it, where it does
    category: Word = ""

    @property
    def groups(self) -> dict[str, str]:
        """`difficulty` and `category`, as far as the benchmark tells; a level is a difficulty, too."""
        difficulty = self.difficulty or (f"level {self.level}" if self.level is not None else "")
        return {name: said for name, said in (("difficulty", difficulty), ("category", self.category)) if said}

    @property
    def solution(self) -> str | None:
        """The benchmark's own answer as a whole program; None where it publishes none."""
        return self.prompt + self.canonical_solution if self.canonical_solution else None


class Task(BaseModel):
    """Problems in the order of their file. Two scores are comparable only if ``digest`` is equal.

    ``source`` says where the problems came from (a file, or a data set at a commit); ``left_out`` which problems of
    the benchmark are not among them, and why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    problems: tuple[Problem, ...]
    source: str = ""
    left_out: dict[str, str] = {}

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the problems as canonical JSON: sorted keys, no spaces, ASCII."""
        rows = []
        for problem in self.problems:
            said = problem.model_dump(mode="json", exclude_defaults=True, exclude=set(_ABOUT))
            rows.append({name: getattr(problem, name) for name in _ALWAYS} | said)
        text = json.dumps(rows, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()
