"""Where an engine's server is on this machine: named by the user, on PATH, or in this very environment."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from qtool import QtoolError
from qtool.evaluate.engines.facts import EngineFacts
from qtool.evaluate.sandbox.secrets import for_child

ASKING = 120.0  # seconds in which a Python says whether it has a package


def variable(facts: EngineFacts) -> str:
    """`QTOOL_VLLM_PYTHON`: the environment variable that names a Python which has the engine."""
    return f"QTOOL_{facts.name.upper().replace('.', '_')}_PYTHON"


def find_program(facts: EngineFacts, python: str | None = None) -> tuple[str, ...] | None:
    """The words that start the engine's server, without its arguments: of ``python``, else of the one that the
    variable names, else the program on PATH, else of this environment. None where it is nowhere. Raises QtoolError for
    a Python that was named and does not have it."""
    named = python or os.environ.get(variable(facts))
    if named and facts.module:
        where = shutil.which(named)
        if where is None:
            raise QtoolError(f"{named}: no Python is there (--python, {variable(facts)}).")
        if not _has(where, facts.package):
            raise QtoolError(f"{named}: has no {facts.package}. Run there: {facts.install}", exit_code=3)
        return (where, *_module(facts))
    if facts.program and (found := shutil.which(facts.program)):
        return (found,)
    if facts.module and importlib.util.find_spec(facts.package) is not None:
        return (sys.executable, *_module(facts))
    return None


def require_program(facts: EngineFacts, python: str | None = None) -> tuple[str, ...]:
    """`find_program`. Raises QtoolError (exit 3) with the line that installs it."""
    found = find_program(facts, python)
    if found is None:
        way = f" If it is elsewhere, name its Python: --python, or {variable(facts)}." if facts.module else ""
        raise QtoolError(f"engine {facts.name} is not installed here. Run: {facts.install}.{way}", exit_code=3)
    return found


def with_program(words: tuple[str, ...], program: tuple[str, ...]) -> tuple[str, ...]:
    """A planned command as this machine starts it: without the program it begins with."""
    known = 3 if words[0].startswith("python") else 1  # `python3 -m module`
    return (*program, *words[known:])


def _module(facts: EngineFacts) -> tuple[str, ...]:
    return ("-P", "-m", facts.module)


def _has(python: str, package: str) -> bool:
    asked = [python, "-P", "-c", f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"]
    try:
        done = subprocess.run(
            asked, env=for_child(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=ASKING,
            check=False, cwd=Path.home() if Path.home().is_dir() else None,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
