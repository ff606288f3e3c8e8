"""EvalPlus' own release files: HumanEvalPlus.jsonl(.gz) and MbppPlus.jsonl(.gz), judged as EvalPlus judges them.

A row has ``task_id, prompt, entry_point, canonical_solution, base_input, plus_input, atol`` (and ``contract``); what is
expected is what the canonical solution returns (Liu et al. 2023, arXiv:2305.01210; github.com/evalplus/evalplus:
data/mbpp.py for the inputs that JSON cannot spell, eval/__init__.py and eval/_special_oracle.py for the comparison).
The same tests written out, as the data sets evalplus/humanevalplus and evalplus/mbppplus have them, need none of this.
"""

import re
from collections.abc import Callable
from typing import Any

from qtool import QtoolError
from qtool.evaluate.sandbox.frames import NotPlain
from qtool.evaluate.sandbox.wire import pack
from qtool.evaluate.tasks.rows import Row, text_of

# Answers that are match objects, which only their own process can see.
RETURNS_OBJECT = frozenset({"check_str", "text_match_three", "text_starta_endb"})
_AS_SETS = frozenset(
    {"similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum"}
    | {"intersection_array", "find_dissimilar", "Diff"}
)
# The limits of evalplus/config.py and eval/__init__.py: at least 4 s for an input, at most 60 s for a problem.
CALL_SECONDS, SECONDS = 4.0, 60.0
# Base-model stop sequences as published: evalplus/provider/utility.py (also BigCodeBench's).
STOP_ALWAYS = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(")
# The user's turn of evalplus/provider/utility.py and codegen.py; BigCodeBench's generate.py begins in the same words.
ASK = "Please provide a self-contained Python script that solves the following problem in a markdown code block:"

_TEST = """
import copy
import math


def _numbers(value):
    if isinstance(value, float):
        return True
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(item, float) for item in value)


def _close(out, expected, atol):
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(out, (list, tuple))
            and len(out) == len(expected)
            and all(_close(a, b, atol) for a, b in zip(out, expected))
        )
    return out == expected or abs(out - expected) <= atol + 1e-07 * abs(expected)


def _right(out, expected, arguments):
    if NAME == "find_zero" and SUITE == "humaneval":
        coefficients = arguments[0]
        return abs(sum(c * math.pow(out, i) for i, c in enumerate(coefficients))) <= ATOL
    if SUITE == "mbpp":
        if NAME in AS_SETS:
            return set(out) == set(expected)
        if NAME in RETURNS_OBJECT:
            return out == expected if isinstance(out, bool) else expected == (out is not None)
        if NAME == "are_equivalent" or (NAME == "sum_div" and out == 0):
            return True
        if NAME == "surface_Area" and abs(out - _pyramid(*arguments)) <= ATOL:
            return True
        if NAME == "digit_distance_nums" and out == _digit_distance(*arguments):
            return True
    if out == expected:
        return True
    atol = 1e-6 if ATOL == 0 and _numbers(expected) else ATOL
    return atol != 0 and type(out) is type(expected) and _close(out, expected, atol)


def _pyramid(edge, height):
    slant = math.sqrt((edge / 2) ** 2 + height**2)
    return round(edge**2 + 2 * edge * slant)


def _digit_distance(first, second):
    width = max(len(str(first)), len(str(second)))
    return sum(abs(int(a) - int(b)) for a, b in zip(str(first).zfill(width), str(second).zfill(width)))


def check(candidate):
    space = {}
    exec(REFERENCE, space)
    for arguments in unpack(INPUTS):
        expected = space[NAME](*copy.deepcopy(arguments))
        if SUITE == "mbpp" and NAME in RETURNS_OBJECT:
            expected = expected is not None
        out = candidate(*copy.deepcopy(arguments))
        assert _right(out, expected, arguments), f"{NAME}{tuple(arguments)!r:.100}: {out!r:.60}, not {expected!r:.60}"
"""


def ask(prompt: str) -> str:
    """The user's turn."""
    return f"{ASK}\n```\n{prompt.strip()}\n```\n"


def as_evalplus_asks(prompt: str) -> dict[str, Any]:
    """How EvalPlus asks and how long it waits."""
    return {"instruction": ask(prompt), "seconds": SECONDS, "call_seconds": CALL_SECONDS}


def is_release_row(row: Row) -> bool:
    """Whether the row is one of an EvalPlus release, tests given as inputs."""
    return {"base_input", "plus_input", "canonical_solution"} <= set(row)


def differential_test(where: str, row: Row, suite: str) -> str:
    """The Python test of a release row: every input through the canonical solution and the candidate.

    ``suite`` is "humaneval" or "mbpp". Raises QtoolError (exit 2) naming the key at fault.
    """
    inputs: list[Any] = []
    for key in ("base_input", "plus_input"):
        value = row[key]
        # The published files write {} for no inputs at all.
        if not isinstance(value, list) and value != {}:
            raise QtoolError(f"{where}: key {key!r} is a {type(value).__name__}, not a list of argument lists.")
        inputs += value or []
    if suite == "mbpp":
        inputs = _revive(text_of(where, row, "task_id"), inputs)
    atol = row.get("atol", 0)
    if type(atol) not in (int, float):
        raise QtoolError(f"{where}: key 'atol' is a {type(atol).__name__}, not a number.")
    try:
        packed = pack(inputs)
    except NotPlain as error:
        raise QtoolError(f"{where}: the inputs cannot be used ({error}).") from error
    constants = {
        "NAME": text_of(where, row, "entry_point"),
        "SUITE": suite,
        "ATOL": atol,
        "AS_SETS": _AS_SETS,
        "RETURNS_OBJECT": RETURNS_OBJECT,
        "REFERENCE": text_of(where, row, "prompt") + text_of(where, row, "canonical_solution"),
        "INPUTS": packed,
    }
    lines = ["from qtool.evaluate.sandbox.wire import unpack"]
    lines += [f"{name} = {_literal(value)}" for name, value in constants.items()]
    return "\n".join(lines) + "\n" + _TEST


def _literal(value: Any) -> str:
    # A frozenset's own repr follows the hash seed: the test's text, and so the task's digest, must not.
    return f"frozenset({sorted(value)!r})" if isinstance(value, frozenset) else repr(value)


# MBPP+ inputs are JSON, which has no tuples, sets and complex numbers: what each problem's arguments become.
_TUPLES: dict[str, str] = {
    "each": "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
    "items": "63 64 70 94 120 237 272 299 400 409 417 438 473 614 780",
    "items of the first": "75 413 444 753",
    "the second": "106 750",
    "the first": "250 405 446 617 720 763 808 307",
    "each and their items": "259 401 445",
    "all": "580 615 791",
}
_KIND = {number: kind for kind, numbers in _TUPLES.items() for number in numbers.split()}


def _deep(value: Any) -> Any:
    return tuple(_deep(item) for item in value) if isinstance(value, list) else value


_REVIVED: dict[str, Callable[[list[Any]], Any]] = {
    "each": lambda given: [tuple(argument) for argument in given],
    "items": lambda given: [[tuple(item) for item in argument] for argument in given],
    "items of the first": lambda given: [[tuple(item) for item in given[0]], given[1]],
    "the second": lambda given: [given[0], tuple(given[1])],
    "the first": lambda given: [tuple(given[0]), *given[1:]],
    "each and their items": lambda given: [tuple(tuple(item) for item in argument) for argument in given],
    "all": _deep,
}
_SINGLE: dict[str, Callable[[list[Any]], Any]] = {
    "115": lambda given: [[set(item) if isinstance(item, list) and item else {} for item in given[0]]],
    "124": lambda given: [float(given[0]), complex(given[1])],
    "252": lambda given: [complex(given[0])],
    "278": lambda given: [tuple(tuple(item) if isinstance(item, list) else item for item in given[0])],
    "722": lambda given: [{key: tuple(value) for key, value in given[0].items()}, *given[1:]],
}


def _revive(task_id: str, inputs: list[Any]) -> list[Any]:
    match = re.search(r"(\d+)$", task_id)
    number = match[1] if match else ""
    change = _SINGLE.get(number) or _REVIVED.get(_KIND.get(number, ""), list)
    try:
        return [change(arguments) for arguments in inputs]
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise QtoolError(f"{task_id}: an input is not of the form MBPP+ gives this problem ({error}).") from error
