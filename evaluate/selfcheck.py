"""The harness judged by known answers, before it judges a model: right ones must all pass, wrong ones must all fail.

Known answers go the way of a model's: prompt, stop rule, extraction, sandbox. A mutant is wrong by construction:

raises   every call raises, so a test can only pass by expecting nothing else, or by never calling.
altered  the published solution with every result changed to one that Python's own == calls different: None becomes 0,
         a number grows, a container grows, anything else becomes None. An exception becomes one of another class.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from qtool import QtoolError
from qtool.evaluate.answers import Asking, answer_task
from qtool.evaluate.engines.engine import Completion, Decoding, Request
from qtool.evaluate.journal import Journal
from qtool.evaluate.tasks.problems import Problem, Task
from qtool.evaluate.tasks.prompts import Style
from qtool.evaluate.tasks.rows import syntax_tree
from qtool.evaluate.tasks.table import benchmark_of

PIECE = 24  # characters that a model would write between two looks at the text
_ALTER = """
def altered_(value):
    if value is None:
        return 0
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        other = value + 1 + abs(value)
    elif isinstance(value, str):
        other = value + "?"
    elif isinstance(value, list):
        other = [*value, None]
    elif isinstance(value, tuple):
        other = (*value, None)
    else:
        return None
    return None if other == value else other
def another_(error):
    return (ArithmeticError if isinstance(error, RuntimeError) else RuntimeError)("a wrong answer")
"""


class SelfCheck(BaseModel):
    """What a task's known answers showed. ``faults``: problem id -> what went wrong; ``unchecked``: problems without a
    published solution."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    task: str
    digest: str
    sandbox: str
    right: int
    wrong: int
    unchecked: list[str]
    faults: dict[str, str]

    def fault(self, digest: str) -> str:
        """What is wrong with a stored check of the task with this digest; "" for nothing."""
        return "" if self.digest == digest and not self.faults else "it is of another task"

    def require(self) -> None:
        """Raises QtoolError (exit 3) naming the problems that the harness judged wrongly."""
        if self.faults:
            shown = "; ".join(f"{name}: {fault}" for name, fault in list(self.faults.items())[:5])
            more = f" (and {len(self.faults) - 5} more)" if len(self.faults) > 5 else ""
            raise QtoolError(
                f"{self.task}: the self-check failed on {len(self.faults)} problems, so no model is scored: "
                f"{shown}{more}. Leave those problems out, or mend the task, the prompt or the sandbox.",
                exit_code=3,
            )


@dataclass(frozen=True)
class _KnownAnswers:
    """An engine that writes given texts, in pieces, and stops where a real one would."""

    texts: Sequence[str]
    name: str = "self-check"
    version: str = ""
    dtype: str = ""
    device: str = ""

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[Completion]:
        for index, request in enumerate(requests):
            if index not in done:
                text = self.texts[index]
                stops = range(PIECE, len(text) + PIECE, PIECE)
                yield index, next((text[:n] for n in stops if request.finished(text[:n])), text)


def check_task(task: Task, asking: Asking, tokenizer: Any, sandbox: str, place: Path) -> SelfCheck:
    """Run the known answers of ``task`` through the whole path; journals lie beside ``place``. Raises QtoolError (exit
    3) where the sandbox itself fails."""
    asking, digest = replace(asking, samples=1), task.digest
    skipped = [problem.task_id for problem in task.problems if not benchmark_of(problem).self_checked(problem)]
    task = Task(name=task.name, problems=tuple(p for p in task.problems if p.task_id not in skipped))
    faults: dict[str, str] = {}
    counts: dict[str, int] = {}
    unchecked = [problem.task_id for problem in task.problems if not answers(problem, asking.style)]
    for asked in task.problems:
        if asked.language == "python" and asked.canonical_solution.strip() and _tree(asked) is None:
            faults[asked.task_id] = "the published solution is no Python"
    for kind in ("solution", "raises", "altered"):
        known = {p: found[kind] for p in task.problems if kind in (found := answers(p, asking.style))}
        part = Task(name=task.name, problems=tuple(known))
        journal = Journal.open(place.with_name(f"{place.name}-{kind}.jsonl"))
        outcomes = answer_task(_KnownAnswers(list(known.values())), part, asking, tokenizer, journal)
        journal.close()
        for problem, (outcome, *_) in outcomes.items():
            if (outcome.outcome == "passed") != (kind == "solution"):
                said = f"the published solution {outcome.outcome} ({outcome.detail})"
                faults[problem] = said if kind == "solution" else f"a wrong answer ({kind}) passed"
        counts[kind] = len(outcomes)
    return SelfCheck(
        task=task.name, digest=digest, sandbox=sandbox, right=counts["solution"],
        wrong=counts["raises"] + counts["altered"], unchecked=skipped + unchecked, faults=faults,
    )  # fmt: skip


def answers(problem: Problem, style: Style) -> dict[str, str]:
    """Kind -> text, as a model would write it; empty where no solution is published or the program is not Python."""
    if not problem.canonical_solution.strip():
        return {}
    whole = style == "chat" or benchmark_of(problem).whole_solutions
    program, tree = _program(problem), _tree(problem)
    function = _function(tree, problem.entry_point) if tree else None
    if function is None:
        return {}
    try:
        return _known(problem, style, program, function, whole)
    except (RecursionError, MemoryError) as error:
        raise QtoolError(
            f"{problem.task_id}: the published solution is nested too deeply for Python to write it anew."
        ) from error


def _known(problem: Problem, style: Style, program: str, function: ast.FunctionDef, whole: bool) -> dict[str, str]:
    if whole:
        found = {"solution": program, "raises": _with_body(program, function, [_raise()])}
    else:
        found = {"solution": problem.canonical_solution, "raises": _body([_raise()])}
    changed = _altered(function)
    found["altered"] = _with_body(program, function, changed) if whole else _body(changed)
    if style == "chat":
        return {kind: f"Here it is:\n\n```python\n{text.rstrip()}\n```\n" for kind, text in found.items()}
    return found


def _program(problem: Problem) -> str:
    return (
        problem.canonical_solution
        if benchmark_of(problem).whole_solutions
        else problem.prompt + problem.canonical_solution
    )


def _tree(problem: Problem) -> ast.Module | None:
    return syntax_tree(_program(problem), f"{problem.task_id}: the published solution")


def _function(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return functions[-1] if functions else None


def _raise() -> ast.stmt:
    return ast.parse('raise RuntimeError("a wrong answer")').body[0]


def _altered(function: ast.FunctionDef) -> list[ast.stmt]:
    """A body that computes the right result from copies of the arguments, so that nothing done to them is seen, and
    returns another. The solution keeps its name inside: its recursion meets right results."""
    inner = ast.parse(ast.unparse(function)).body[0]
    assert isinstance(inner, ast.FunctionDef)
    inner.decorator_list = []
    inner.body = inner.body[ast.get_docstring(inner) is not None :]
    arguments = function.args
    passed = [f"copied_({a.arg})" for a in [*arguments.posonlyargs, *arguments.args]]
    passed += [f"*copied_({arguments.vararg.arg})"] if arguments.vararg else []
    passed += [f"{a.arg}=copied_({a.arg})" for a in arguments.kwonlyargs]
    passed += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    # What is right may be an exception: then another one is wrong.
    call = f"try:\n return altered_({function.name}({', '.join(passed)}))\n"
    call += "except Exception as error:\n raise another_(error) from None"
    return [*ast.parse("from copy import deepcopy as copied_" + _ALTER).body, inner, *ast.parse(call).body]


def _body(statements: list[ast.stmt]) -> str:
    text = "\n".join(ast.unparse(ast.fix_missing_locations(statement)) for statement in statements)
    return "".join(f"    {line}\n" if line else "\n" for line in text.split("\n"))


def _with_body(program: str, function: ast.FunctionDef, body: list[ast.stmt]) -> str:
    """``program`` with another body for ``function``."""
    tree = ast.parse(program)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function.name:
            node.body = body
    return ast.unparse(ast.fix_missing_locations(tree))
