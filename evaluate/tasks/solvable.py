"""Which problems this machine can judge, where that is in doubt: those it solves itself."""

import ast

from qtool import QtoolError
from qtool.evaluate.sandbox.execute import Outcome, run_programs
from qtool.evaluate.tasks.loading import as_job
from qtool.evaluate.tasks.problems import Problem, Task


def solvable(task: Task, timeout: float, sandbox: str) -> Task:
    """``task`` as this machine can judge it; ``left_out`` says which problems it cannot, and how they failed.

    Some tests share more with the program than values: objects of their own, the output, files, a random seed. Where
    the published solution fails such a test over the pipe and passes it in one process, the problem is judged in one
    process, and counted. Where it fails in both, and the test passes what cannot cross, the problem is left out.
    Published solutions that use libraries in one process (BigCodeBench) are tried too: their tests may want another
    version of a library, a program to start, or the network, which the sandbox refuses.
    Raises as run_programs does, and QtoolError where no problem is left.
    """
    own = [p for p in task.problems if p.run == "in_process" and p.libraries and p.solution is not None]
    odd = [p for p in task.problems if p.run == "call" and p.solution is not None and _shares_more(p)]
    said = _tried([*own, *odd], timeout, sandbox)
    wrong = [p for p in odd if p.task_id in said and said[p.task_id].outcome in ("failed", "unjudged")]
    moved = {p.task_id: p.model_copy(update={"run": "in_process"}) for p in wrong}
    for name in _tried(list(moved.values()), timeout, sandbox):
        del moved[name]
    left_out = {
        p.task_id: f"its published solution fails here: {_reason(said[p.task_id])}" for p in own if p.task_id in said
    }
    unjudged = [p for p in wrong if p.task_id not in moved and said[p.task_id].outcome == "unjudged"]
    left_out |= {p.task_id: said[p.task_id].detail for p in unjudged}
    if not moved and not left_out:
        return task
    kept = tuple(moved.get(p.task_id, p) for p in task.problems if p.task_id not in left_out)
    if not kept:
        name, why = next(iter(left_out.items()))
        raise QtoolError(f"task {task.name}: none of its problems can be judged here. {name}: {why}.")
    return Task(name=task.name, problems=kept, source=task.source, left_out=task.left_out | left_out)


def _tried(problems: list[Problem], timeout: float, sandbox: str) -> dict[str, Outcome]:
    """The outcomes of the published solutions that do not pass."""
    if not problems:
        return {}
    jobs = [as_job(problem, problem.solution or "") for problem in problems]
    outcomes = run_programs(jobs, timeout=timeout, sandbox=sandbox)
    return {outcome.task_id: outcome for outcome in outcomes if not outcome.passed}


def _reason(outcome: Outcome) -> str:
    return outcome.detail or outcome.outcome


def _shares_more(problem: Problem) -> bool:
    """Whether the test may share more with the program than plain values: objects of own classes or of other modules,
    files, identity."""
    if problem.language != "python":
        return False
    try:
        tree = ast.parse(problem.test)
    except (SyntaxError, ValueError):
        return True
    return any(_odd(node) for node in ast.walk(tree))


def _odd(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in ("object", "open", "type", "vars", "isinstance", "id", "hash")
    if isinstance(node, ast.Compare):
        against = zip(node.ops, node.comparators, strict=True)
        return any(isinstance(op, (ast.Is, ast.IsNot)) and not isinstance(b, ast.Constant) for op, b in against)
    if isinstance(node, (ast.ClassDef, ast.Import, ast.ImportFrom, ast.Delete, ast.AsyncFor, ast.AsyncWith)):
        return True
    if isinstance(node, ast.BinOp):
        return isinstance(node.left, ast.Call) or isinstance(node.right, ast.Call)
    # An attribute of what the program gave.
    return isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Call, ast.Attribute))
