"""MBPP, and MBPP+: a sentence and one assert, judged by all of them.

Sources: Austin et al. 2021, arXiv:2108.07732, https://github.com/google-research/google-research/tree/master/mbpp;
EvalPlus' data set and its release (see evalplus); bigcode-evaluation-harness' tasks/mbpp.py for the stop sequences.
"""

from __future__ import annotations

import ast
import builtins

from qtool import QtoolError
from qtool.evaluate.tasks import evalplus
from qtool.evaluate.tasks.benchmark import Benchmark, DataSet
from qtool.evaluate.tasks.evalplus import STOP_ALWAYS, as_evalplus_asks, ask
from qtool.evaluate.tasks.problems import Problem
from qtool.evaluate.tasks.rows import Row, humaneval_keys, problem, syntax_tree, text_of, texts_of, third_party

STOP = (*STOP_ALWAYS, '\n"""', "\nassert", "\nclass", "\n<|/", "\n```")
# The test split of the 974 problems; the others are the paper's few-shot, validation and training problems.
TEST_SPLIT = range(11, 511)


def read(where: str, row: Row) -> Problem | None:
    """MBPP (mbpp.jsonl or sanitized-mbpp.json), MBPP+'s data set, and EvalPlus' MbppPlus release.

    None for the problems outside MBPP's test split.
    """
    if evalplus.is_release_row(row):
        name = text_of(where, row, "entry_point")
        test = evalplus.differential_test(where, row, "mbpp")
        released = (
            humaneval_keys(row) | {"test": test, "format": "mbpp"} | as_evalplus_asks(text_of(where, row, "prompt"))
        )
        run = "in_process" if name in evalplus.RETURNS_OBJECT else "call"
        return problem(where, released | {"stop": STOP, "run": run})
    number = row.get("task_id")
    if type(number) is not int:
        raise QtoolError(f"{where}: key 'task_id' is {number!r:.40}, not MBPP's number.")
    if number not in TEST_SPLIT:
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
            "stop": STOP,
            "libraries": third_party([test, code]),
            "instruction": ask(prompt),
        }
        | (as_evalplus_asks(prompt) if plus else {}),
    )


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


def recognizes(row: Row) -> bool:
    """By the asserts, or by the name in EvalPlus' release."""
    return "test_list" in row or (evalplus.is_release_row(row) and str(row.get("task_id")).startswith("Mbpp/"))


BENCHMARK = Benchmark(
    format="mbpp",
    data_sets={
        "mbpp": DataSet(
            "google-research-datasets/mbpp",
            "4bb6404fdc6cacfda99d4ac4205087b89d32030c",
            ("full/test-*.parquet",),
            500,
            "CC-BY-4.0",
            "mbpp.jsonl",
        ),
        "mbpp+": DataSet(
            "evalplus/mbppplus",
            "b2d74c91837c3f2a20c1299ae98133cbe7cfa077",
            ("data/test-*.parquet",),
            378,
            "Apache-2.0",
            "MbppPlus.jsonl.gz",
        ),
    },
    read=read,
    recognizes=recognizes,
    whole_solutions=True,
)
