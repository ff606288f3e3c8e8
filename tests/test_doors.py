"""Rooms of evaluate: what the outside may call of the sandbox; nobody asks an engine or a benchmark its name."""

from __future__ import annotations

import ast

from imports import imports, modules, packages

from qtool.evaluate.engines.table import ENGINES
from qtool.evaluate.tasks.table import BENCHMARKS, data_sets

SANDBOX = "qtool.evaluate.sandbox."
DOORS = {
    "execute.Job", "execute.Outcome", "execute.run_programs", "execute.detect_sandbox",
    "secrets", "secrets.for_child", "secrets.hidden",
    "frames.NotPlain", "wire.pack", "wire.unpack", "wire.NAME_IN_TESTS",
}  # fmt: skip


def named(text: str, names: set[str]) -> list[str]:
    """Comparisons with one of ``names``, a line each."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare):
            constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            found += [f"line {node.lineno}: {value}" for value in constants if value in names]
    return found


def test_the_sandbox_has_few_doors() -> None:
    used = set()
    for module, path in modules(packages()).items():
        if not module.startswith(SANDBOX):
            targets = (one.target for one in imports(path.read_text(encoding="utf-8")))
            used |= {target.removeprefix(SANDBOX) for target in targets if target.startswith(SANDBOX)}
    assert used <= DOORS


def test_nobody_asks_an_engine_or_a_benchmark_what_it_is() -> None:
    names = {*ENGINES, *BENCHMARKS, *data_sets()}
    for module, path in modules(packages()).items():
        if not module.startswith(("qtool.evaluate.engines.", "qtool.evaluate.tasks.")):
            assert named(path.read_text(encoding="utf-8"), names) == [], module


def test_a_planted_question_is_seen() -> None:
    assert named('if engine == "vllm" or kind in ("mbpp", "x"): pass', {"vllm", "mbpp"}) == [
        "line 1: vllm", "line 1: mbpp",
    ]  # fmt: skip
    assert named('ENGINES["vllm"]', {"vllm"}) == []
