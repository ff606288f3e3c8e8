"""Which problems of a benchmark that needs third-party libraries this machine can judge: those it solves itself."""

from qtool.evaluate.execute import run_programs
from qtool.evaluate.problems import Task
from qtool.evaluate.tasks import as_job


def solvable(task: Task, timeout: float, sandbox: str) -> Task:
    """``task`` without the problems whose published solution fails here; ``left_out`` says how it failed.

    Only problems judged in process with libraries are tried (BigCodeBench): their tests may want another version of a
    library, a program to start, or the network, which the sandbox refuses. Raises as run_programs does.
    """
    tried = [p for p in task.problems if p.run == "in_process" and p.libraries and p.solution is not None]
    if not tried:
        return task
    jobs = [as_job(problem, problem.solution or "") for problem in tried]
    outcomes = run_programs(jobs, timeout=timeout, sandbox=sandbox)
    said = "its published solution fails here"
    failed = {o.task_id: f"{said}: {o.detail or o.outcome}" for o in outcomes if not o.passed}
    if not failed:
        return task
    kept = tuple(problem for problem in task.problems if problem.task_id not in failed)
    return Task(name=task.name, problems=kept, source=task.source, left_out=task.left_out | failed)
