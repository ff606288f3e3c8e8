"""What became of an answer, finer than passed or failed: how a damaged model fails tells what is wrong with it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal

from qtool.evaluate.scorecard import ProblemOutcome

Kind = Literal["passed", "wrong", "syntax", "timeout", "loop", "empty", "error"]
KINDS: tuple[Kind, ...] = ("passed", "wrong", "syntax", "timeout", "loop", "empty", "error")
MEANINGS: dict[Kind, str] = {
    "passed": "every test held",
    "wrong": "ran, and a test failed or an exception ended it",
    "syntax": "is no program of the language",
    "timeout": "ran until its time was up",
    "loop": "repeats itself until it was cut off",
    "empty": "holds nothing but blanks",
    "error": "could not be judged",
}
REPEATS = 6  # times that the end of an answer says the same
LONGEST = 400  # characters of what is said again and again
_SYNTAX = re.compile(r"\b(SyntaxError|IndentationError|TabError)\b")


def kind_of(answer: ProblemOutcome) -> Kind:
    """Which of `KINDS` an answer is; the first that fits, an answer that repeats itself before what it broke."""
    if answer.outcome == "passed":
        return "passed"
    if not answer.completion.strip():
        return "empty"
    if repeats(answer.completion):
        return "loop"
    if answer.outcome in ("timeout", "error"):
        return "timeout" if answer.outcome == "timeout" else "error"
    return "syntax" if _SYNTAX.search(answer.detail) else "wrong"


def repeats(text: str) -> bool:
    """Whether the text ends with one passage `REPEATS` times over. Passages of blanks do not count, nor do those of one
    letter or sign (`====` under a heading)."""
    end = text[-REPEATS * LONGEST - LONGEST :]
    for size in range(2, min(LONGEST, len(end) // REPEATS) + 1):
        part = end[-size:]
        if len(set(part.strip())) > 1 and end.endswith(part * REPEATS):
            return True
    return False


def counts(answers: Iterable[ProblemOutcome]) -> dict[Kind, int]:
    """How many of each, those that are there, in the order of `KINDS`."""
    found = Counter(kind_of(answer) for answer in answers)
    return {kind: found[kind] for kind in KINDS if found[kind]}
