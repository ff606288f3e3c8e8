"""Which problems this machine can judge, where that is in doubt: those it solves itself."""

import ast

from qtool.evaluate.execute import run_programs
from qtool.evaluate.problems import Problem, Task
from qtool.evaluate.tasks import as_job


def solvable(task: Task, timeout: float, sandbox: str) -> Task:
    """``task`` without the problems whose published solution fails here; ``left_out`` says how it failed.

    Problems judged in process with libraries are tried (BigCodeBench): their tests may want another version of a
    library, a program to start, or the network, which the sandbox refuses. So are those whose test makes objects of
    other than Python's own types: those that cannot be passed to the program are left out. Raises as run_programs does.
    """
    own = [p for p in task.problems if p.run == "in_process" and p.libraries and p.solution is not None]
    odd = [p for p in task.problems if p.run == "call" and p.solution is not None and _passes_objects(p)]
    tried = [*own, *odd]
    if not tried:
        return task
    jobs = [as_job(problem, problem.solution or "") for problem in tried]
    outcomes = run_programs(jobs, timeout=timeout, sandbox=sandbox)
    said = "its published solution fails here"
    odd_names = {problem.task_id for problem in odd}
    failed = {
        o.task_id: o.detail if o.outcome == "unjudged" else f"{said}: {o.detail or o.outcome}"
        for o in outcomes
        if not o.passed and (o.task_id not in odd_names or o.outcome == "unjudged")
    }
    if not failed:
        return task
    kept = tuple(problem for problem in task.problems if problem.task_id not in failed)
    return Task(name=task.name, problems=kept, source=task.source, left_out=task.left_out | failed)


def _passes_objects(problem: Problem) -> bool:
    """Whether the test may hold objects that cannot cross to the program: of own classes, or of other modules."""
    if problem.language != "python":
        return False
    try:
        tree = ast.parse(problem.test)
    except (SyntaxError, ValueError):
        return True
    odd = (ast.ClassDef, ast.Import, ast.ImportFrom)
    return any(isinstance(node, odd) or (isinstance(node, ast.Name) and node.id == "object") for node in ast.walk(tree))
