"""From a row of a benchmark's published file to a Problem. Pure functions: one for each format.

Sources: HumanEval (Chen et al. 2021, arXiv:2107.03374, https://github.com/openai/human-eval); MBPP (Austin et al. 2021,
arXiv:2108.07732, https://github.com/google-research/google-research/tree/master/mbpp); EvalPlus' data sets and releases
(see evalplus); BigCodeBench (Zhuo et al. 2024, arXiv:2406.15877, https://github.com/bigcode-project/bigcodebench);
MultiPL-E (Cassano et al. 2022, arXiv:2208.08227, https://github.com/nuprl/MultiPL-E); LiveCodeBench: see livecodebench.
"""

import ast
import builtins
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from qtool import QtoolError
from qtool.evaluate.tasks import evalplus, livecodebench
from qtool.evaluate.tasks.problems import Format, Problem
from qtool.evaluate.tasks.rows import Row, problem, syntax_tree, text_of, texts_of

# Base-model stop sequences as published: evalplus/provider/utility.py (also BigCodeBench's) and, for MBPP, with those
# of bigcode-evaluation-harness' tasks/mbpp.py.
STOP_ALWAYS = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(")
STOP_MBPP = (*STOP_ALWAYS, '\n"""', "\nassert", "\nclass", "\n<|/", "\n```")
# The user's turn of evalplus/provider/utility.py and codegen.py; BigCodeBench's generate.py begins in the same words.
ASK = "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
# BigCodeBench allows 240 s; an endless loop in every tenth answer would then take hours.
BIGCODEBENCH_SECONDS = 60.0
# The test split of the 974 problems; the others are the paper's few-shot, validation and training problems.
MBPP_TEST = range(11, 511)
_LANGUAGES = {"js": "javascript", "py": "python"}


def humaneval(where: str, row: Row) -> Problem:
    """HumanEval's format, HumanEval+'s data set, and EvalPlus' HumanEvalPlus release."""
    if evalplus.is_release_row(row):
        test = evalplus.differential_test(where, row, "humaneval")
        return problem(where, _keys(row) | {"test": test} | _plus(text_of(where, row, "prompt")))
    given = row.get("test")
    libraries = third_party([given]) if isinstance(given, str) else ()
    # HumanEval+'s data set is known by the numpy in its tests.
    plus = {"libraries": libraries} | _plus(text_of(where, row, "prompt")) if libraries else {}
    return problem(where, _keys(row) | plus)


def mbpp(where: str, row: Row) -> Problem | None:
    """MBPP (mbpp.jsonl or sanitized-mbpp.json), MBPP+'s data set, and EvalPlus' MbppPlus release.

    None for the problems outside MBPP's test split.
    """
    if evalplus.is_release_row(row):
        name = text_of(where, row, "entry_point")
        test = evalplus.differential_test(where, row, "mbpp")
        released = _keys(row) | {"test": test, "format": "mbpp"} | _plus(text_of(where, row, "prompt"))
        run = "in_process" if name in evalplus.RETURNS_OBJECT else "call"
        return problem(where, released | {"stop": STOP_MBPP, "run": run})
    number = row.get("task_id")
    if type(number) is not int:
        raise QtoolError(f"{where}: key 'task_id' is {number!r:.40}, not MBPP's number.")
    if number not in MBPP_TEST:
        return None
    asserts = texts_of(where, row, "test_list")
    if not asserts:
        raise QtoolError(f"{where}: key 'test_list' is missing or empty: nothing to judge an answer by.")
    text = text_of(where, row, "text" if "text" in row else "prompt").strip()
    code = text_of(where, row, "code").replace("\r\n", "\n").strip() + "\n"
    plus = isinstance(row.get("test"), str)
    before = [*texts_of(where, row, "test_imports"), row.get("test_setup_code") or ""]
    test = row["test"] if plus else "\n".join([*(part for part in before if part), *asserts]) + "\n"
    test = test.replace("\r\n", "\n")
    name = _called(where, code, asserts)
    prompt = f'"""\n{text}\n{asserts[0].strip()}\n"""\n'
    return problem(
        where,
        {
            "task_id": f"Mbpp/{number}",
            "prompt": prompt,
            "entry_point": name,
            "canonical_solution": code,
            "test": test,
            "format": "mbpp",
            "run": "in_process" if _shares_objects(where, test, name) else "call",
            "stop": STOP_MBPP,
            "libraries": third_party([test, code]),
            "instruction": _ask(prompt),
        }
        | (_plus(prompt) if plus else {}),
    )


def bigcodebench(where: str, row: Row) -> Problem:
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
            "seconds": BIGCODEBENCH_SECONDS,
        },
    )


def multipl_e(where: str, row: Row) -> Problem:
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


READERS: dict[Format, Callable[[str, Row], Problem | None]] = {
    "humaneval": humaneval,
    "mbpp": mbpp,
    "bigcodebench": bigcodebench,
    "livecodebench": livecodebench.problem_of,
    "multipl-e": multipl_e,
}


def guess(row: Row) -> Format:
    """Which benchmark's format a row has, by the keys only that one has."""
    if {"question_content", "private_test_cases"} <= set(row):
        return "livecodebench"
    if {"complete_prompt", "instruct_prompt"} <= set(row):
        return "bigcodebench"
    if {"tests", "stop_tokens"} <= set(row):
        return "multipl-e"
    if "test_list" in row or (evalplus.is_release_row(row) and str(row.get("task_id")).startswith("Mbpp/")):
        return "mbpp"
    return "humaneval"


def third_party(sources: Iterable[str]) -> tuple[str, ...]:
    """Top-level names of the modules that the Python sources import and the standard library lacks, sorted."""
    found: set[str] = set()
    for source in sources:
        if "import" not in source:  # most have none; to parse a thousand takes seconds
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the sandbox, or `problem`, says so
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return tuple(sorted(found - sys.stdlib_module_names - {"qtool"}))


def _keys(row: Row) -> Row:
    """HumanEval's keys. Others, were they named like a Problem's, would change how it is judged."""
    wanted = ("task_id", "prompt", "entry_point", "canonical_solution", "test", "level")
    return {key: row[key] for key in wanted if key in row}


def _ask(prompt: str) -> str:
    return f"{ASK}\n```\n{prompt.strip()}\n```\n"


def _plus(prompt: str) -> dict[str, Any]:
    """How EvalPlus asks and how long it waits."""
    return {"instruction": _ask(prompt), "seconds": evalplus.SECONDS, "call_seconds": evalplus.CALL_SECONDS}


def _called(where: str, code: str, asserts: list[str]) -> str:
    """The function that MBPP asks for: the first one called by the asserts that the solution defines."""
    try:
        defined = {
            node.name for node in ast.parse(code).body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        }
        calls = [node for text in asserts for node in ast.walk(ast.parse(text.strip())) if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        said = f" ({error.msg})" if isinstance(error, SyntaxError) else ", or nested too deeply"
        raise QtoolError(f"{where}: 'code' or 'test_list' is not Python{said}.") from error
    for call in calls:
        if isinstance(call.func, ast.Name) and call.func.id in defined:
            return call.func.id
    raise QtoolError(f"{where}: no assert of 'test_list' calls a function that 'code' defines.")


def _shares_objects(where: str, test: str, name: str) -> bool:
    """Whether the test needs more of the program than plain values from ``name``: then both share one process.

    That is: it uses other names of the program, makes objects of its own classes, or passes functions.
    """
    if name in evalplus.RETURNS_OBJECT:
        return True
    tree = syntax_tree(test, f"{where}: key 'test'")
    if tree is None:
        raise QtoolError(f"{where}: the test is not Python.")
    loaded: set[str] = set()
    bound = {name, *dir(builtins)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    if loaded - bound or loaded & classes:
        return True
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            if any(_is_function(value, own) for argument in given for value in ast.walk(argument)):
                return True
    return False


def _is_function(node: ast.AST, own: set[str]) -> bool:
    return isinstance(node, ast.Lambda) or (isinstance(node, ast.Name) and node.id in own)
