"""LiveCodeBench's code generation problems: contest problems with their date, judged by stdin or by a method's calls.

A row has ``question_title, question_content, platform, question_id, contest_id, contest_date, starter_code,
difficulty, public_test_cases, private_test_cases, metadata`` (Jain et al. 2024, arXiv:2403.07974;
https://github.com/LiveCodeBench/LiveCodeBench: benchmarks/code_generation.py for the row, prompts/code_generation.py
for the wording, evaluation/testing_util.py for the comparison). The private tests are JSON, or JSON in a pickle in
zlib in base64: the pickle is read as a list of opcodes, of which only those that spell one text are accepted, and never
loaded.
"""

import base64
import binascii
import datetime
import json
import pickletools
import zlib
from typing import Any

from qtool import QtoolError
from qtool.evaluate.tasks.benchmark import Benchmark, DataSet
from qtool.evaluate.tasks.extract import cut
from qtool.evaluate.tasks.problems import Problem
from qtool.evaluate.tasks.reply import last_block, without_thoughts
from qtool.evaluate.tasks.rows import Row, problem, text_of

CALL_SECONDS = 6.0  # the published limit for one test
MAX_SECONDS = 120.0
_MAX_TESTS = 512 * 2**20
_TEXT = frozenset({"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"})
_AROUND_TEXT = frozenset({"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"})

# Every answer may use these without importing them, as in the published harness.
_MODULES = ["string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"]
_MODULES += ["itertools", "functools", "operator", "io", "sys", "json"]
IMPORTS = (
    "".join(f"from {name} import *\n" for name in [*_MODULES, "builtins", "typing"])
    + "".join(f"import {name}\n" for name in _MODULES)
    + "sys.setrecursionlimit(50000)\n"
)

_STDIN_TEST = """
import json
from decimal import Decimal


def _numbers(line):
    try:
        return [Decimal(part) for part in line.split()]
    except ArithmeticError:
        return None


def _same(out, expected):
    printed, wanted = ([line.strip() for line in text.strip().split("\\n")] for text in (out, expected))
    if len(printed) != len(wanted):
        return False
    for line, right in zip(printed, wanted):
        if line != right and (_numbers(line) is None or _numbers(line) != _numbers(right)):
            return False
    return True


def check(candidate):
    for number, (given, expected) in enumerate(json.loads(TESTS)):
        out = candidate(given)
        assert _same(out, expected), f"test {number}: printed {out!r:.80}, not {expected!r:.80}"
"""
_CALL_TEST = """
import json


def check(candidate):
    for number, (given, expected) in enumerate(json.loads(TESTS)):
        out = candidate(*[json.loads(line) for line in given.split("\\n")])
        out = list(out) if isinstance(out, tuple) else out
        assert out == json.loads(expected), f"test {number}: {out!r:.80}, not {expected:.80}"
"""

# A worked example for base models, in the published layout. The examples are qtool's own problems.
_EXAMPLE_STDIN = (
    "A shelf holds n books. Each day a visitor takes one book from the shelf or puts one back. Given the days as a "
    "word of the letters T (took) and P (put back), print how many books are on the shelf at the end.\n\nInput: n on "
    "the first line, the word on the second.\n\nSample Input\n5\nTTP\n\nSample Output\n4",
    "",
    "n = int(input())\ndays = input().strip()\nprint(n - days.count('T') + days.count('P'))",
)
_EXAMPLE_CALL = (
    "You are given a list of whole numbers steps. Return the position after each step, starting from 0.\n\nExample 1:\n"
    "\nInput: steps = [1,2,-3]\nOutput: [1,3,0]",
    "class Solution:\n    def positions(self, steps: List[int]) -> List[int]:\n        ",
    "class Solution:\n    def positions(self, steps: List[int]) -> List[int]:\n        here, places = 0, []\n"
    "        for step in steps:\n            here += step\n            places.append(here)\n        return places",
)


def contest_date(where: str, row: Row) -> datetime.date:
    """The day of the contest. Raises QtoolError (exit 2) if the row has none."""
    value = row.get("contest_date")
    if isinstance(value, datetime.datetime):
        return value.date()
    try:
        return datetime.datetime.fromisoformat(str(value)).date()
    except ValueError as error:
        raise QtoolError(f"{where}: key 'contest_date' is {value!r:.40}, not a date (2025-01-31).") from error


def read(where: str, row: Row) -> Problem:
    """One row as a Problem. Raises QtoolError (exit 2) naming the key at fault."""
    starter = text_of(where, row, "starter_code")
    question = text_of(where, row, "question_content")
    name = _function_name(where, row)
    if bool(name) != bool(starter.strip()):
        raise QtoolError(f"{where}: 'starter_code' and metadata's 'func_name' must both be given, or neither.")
    tests = _tests(where, row)
    test = f"TESTS = {json.dumps(tests)!r}\n" + (_CALL_TEST if name else _STDIN_TEST)
    return problem(
        where,
        {
            "task_id": text_of(where, row, "question_id"),
            "prompt": _base_prompt(question, starter),
            "instruction": _instruction(question, starter),
            "entry_point": name or "main",
            "canonical_solution": "",
            "test": test,
            "format": "livecodebench",
            "run": "call" if name else "stdin",
            "stop": ("###",),
            "difficulty": row.get("difficulty"),
            "category": row.get("platform"),
            "seconds": min(MAX_SECONDS, CALL_SECONDS * len(tests)),
            "call_seconds": CALL_SECONDS,
        },
    )


def _base_prompt(question: str, starter: str) -> str:
    def block(parts: tuple[str, str, str]) -> str:
        asked, begun, answer = parts
        code = f"### Starter Code\n{begun}\n\n" if begun else ""
        return f"### Question\n{asked}\n\n{code}### Answer\n\n{answer}" + ("\n\n" if answer else "")

    return block(_EXAMPLE_CALL if starter else _EXAMPLE_STDIN) + block((question, starter, ""))


_EXPERT = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)


def _instruction(question: str, starter: str) -> str:
    """The published messages, the system's above the user's, as published for models without a system message."""
    if starter:
        how = (
            "You will use the following starter code to write the solution to the problem and enclose your code within "
            f"delimiters.\n```python\n{starter}\n```\n\n"
        )
    else:
        how = (
            "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the "
            "sample inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, "
            "it reads the inputs, runs the algorithm and writes output to STDOUT.\n```python\n# YOUR CODE HERE\n```\n\n"
        )
    asked = f"{_EXPERT}\n\n### Question:\n{question}\n\n### Format: {how}"
    return asked + "### Answer: (use the provided format with backticks)\n\n"


def _function_name(where: str, row: Row) -> str:
    metadata = row.get("metadata") or "{}"
    try:
        known = json.loads(metadata) if isinstance(metadata, str) else metadata
        name = known.get("func_name") or ""
    except (ValueError, AttributeError, RecursionError) as error:
        raise QtoolError(f"{where}: key 'metadata' is not a JSON object.") from error
    return str(name)


def _tests(where: str, row: Row) -> list[tuple[str, str]]:
    """(input, expected output) of the public and the private tests, in that order."""
    tests: list[Any] = []
    for key in ("public_test_cases", "private_test_cases"):
        text = text_of(where, row, key)
        try:
            found = json.loads(text)
        except RecursionError as error:
            raise QtoolError(f"{where}: key {key!r} is nested too deeply.") from error
        except ValueError:
            found = json.loads(decode_tests(f"{where}: key {key!r}", text))
        if not isinstance(found, list):
            raise QtoolError(f"{where}: key {key!r} is not a list of tests.")
        tests += found
    if not tests:
        raise QtoolError(f"{where}: no tests.")
    for test in tests:
        if not (isinstance(test, dict) and isinstance(test.get("input"), str) and isinstance(test.get("output"), str)):
            raise QtoolError(f"{where}: a test has no text 'input' and 'output'.")
    return [(test["input"], test["output"]) for test in tests]


def decode_tests(where: str, text: str) -> str:
    """The JSON in base64(zlib(pickle(JSON text))). Raises QtoolError (exit 2) for a pickle of anything but one text."""
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(text, validate=True), _MAX_TESTS)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise QtoolError(f"{where}: neither JSON nor base64 of a zlib stream ({error}).") from error
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise QtoolError(f"{where}: damaged, or more than {_MAX_TESTS >> 20} MiB of tests.")
    found: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _TEXT and isinstance(argument, str):
                found.append(argument)
            elif opcode.name not in _AROUND_TEXT:
                raise QtoolError(
                    f"{where}: the pickle holds more than one text (opcode {opcode.name}). A pickle can run code when "
                    "it is loaded: qtool reads only those that hold JSON. Get the file from its publisher."
                )
    except ValueError as error:
        raise QtoolError(f"{where}: a damaged pickle ({error}).") from error
    if len(found) != 1:
        raise QtoolError(f"{where}: the pickle holds {len(found)} texts, not one.")
    try:
        json.loads(found[0])
    except (ValueError, RecursionError) as error:
        raise QtoolError(f"{where}: the pickled text is not JSON.") from error
    return found[0]


def from_text(problem: Problem, text: str) -> str:
    """The prompt is prose: the answer is the program, fenced or not."""
    answer = cut(text, problem.stop)
    return IMPORTS + (last_block(answer) or answer).strip() + "\n"


def from_reply(problem: Problem, text: str) -> str:
    """The reply's last block, or all of it."""
    return IMPORTS + (last_block(text) or without_thoughts(text)).strip("\n") + "\n"


BENCHMARK = Benchmark(
    format="livecodebench",
    data_sets={
        "livecodebench": DataSet(
            "livecodebench/code_generation_lite",
            "0fe84c3912ea0c4d4a78037083943e8f0c4dd505",
            ("test*.jsonl",),
            1055,
            "CC (as its data set card says; the problems are the contest sites')",
            "test6.jsonl",
        ),
    },
    read=read,
    recognizes=lambda row: {"question_content", "private_test_cases"} <= set(row),
    day=contest_date,
    from_text=from_text,
    from_reply=from_reply,
)
