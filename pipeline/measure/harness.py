"""The harness's self-check of a task: made once and kept for all runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from qtool.convert.files.durable import held, load, save, sweep
from qtool.evaluate.answers import Asking
from qtool.evaluate.engines.engine import package_versions
from qtool.evaluate.selfcheck import SelfCheck, check_task
from qtool.evaluate.tasks.problems import Task
from qtool.make.job import PACKAGES
from qtool.recipe.checking import digest_of
from qtool.runs.stages import stage


def self_checked(task: Task, asking: Asking, tokenizer: Any, sandbox: str, runs: Path, bar: Progress) -> SelfCheck:
    """Known answers to ``task``, judged; found again where task, sandbox and versions are the same. Raises QtoolError
    (exit 3) where the sandbox itself fails."""
    key = digest_of([task.digest, asking.style, sandbox, asking.timeout, package_versions(*PACKAGES)])
    path = runs / "selfchecks" / f"{key[:16]}.json"
    with held(path.with_suffix(".lock"), f"{path}: another qtool is making this self-check; waiting."):
        sweep(path.parent)
        known = load(SelfCheck, path, partial(SelfCheck.fault, digest=task.digest))
        return known or _made(task, asking, tokenizer, sandbox, path, bar)


def _made(task: Task, asking: Asking, tokenizer: Any, sandbox: str, path: Path, bar: Progress) -> SelfCheck:
    row = bar.add_task(f"self-check: {task.name}", total=1)
    with stage("self-check", task.name):
        result = check_task(task, asking, tokenizer, sandbox, path.with_suffix(""))
    bar.advance(row)
    if not result.faults:  # one that failed is made again: its cause may be gone
        save(path, result)
    return result
