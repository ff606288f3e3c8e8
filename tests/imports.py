"""What a Python file imports, read from its source with ast: at the top, inside functions, and in the commands that it
starts (`python -m qtool.x`, `python -c "import qtool.x"`)."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
# In a string: "from qtool.x import y", "import qtool.x"; a string that is a module's name and nothing else.
_STATEMENT = re.compile(r"(?:^|[;\n])\s*(?:from\s+([\w.]+)\s+import\s+([\w, ]+)|import\s+([\w.]+))")
_NAME = re.compile(r"qtool(\.\w+)+")


@dataclass(frozen=True)
class Import:
    """``target``: a dotted name as the file says it, down to the name taken from a module (`qtool.sizing.plan.gib`)."""

    target: str
    line: int
    at_top: bool  # while the file itself is imported; not in a function, not for type checkers only
    bare: bool  # a string that may be a module's name or anything else (`qtool.json`)


@cache
def imports(text: str) -> list[Import]:
    """All imports of a file's source. Relative ones are not qtool's way and raise ValueError."""
    tree = ast.parse(text)
    at_top = set(_run_at_import(tree))
    return [
        Import(target, node.lineno, node in at_top, isinstance(node, ast.Constant) and node.value == target)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Constant)
        for target in _targets(node)
    ]


def _targets(node: ast.Import | ast.ImportFrom | ast.Constant) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level:
            raise ValueError(f"line {node.lineno}: a relative import")
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if not isinstance(node.value, str) or "qtool" not in node.value:
        return []
    if _NAME.fullmatch(node.value):
        return [node.value]
    return [
        f"{package}.{name.strip()}" if package else module
        for package, names, module in _STATEMENT.findall(node.value)
        for name in (names or "_").split(",")
        if (package or module).split(".")[0] == "qtool"
    ]


def _run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements that importing the file runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Constant):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _run_at_import(node)


def packages(root: Path = ROOT) -> dict[str, Path]:
    """Package -> its folder, as pyproject.toml says."""
    folders = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    return {name: root / folder for name, folder in folders.items()}


def modules(folders: dict[str, Path]) -> dict[str, Path]:
    """Module -> its file, for all packages, subfolders included."""
    found = {}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def module_of(target: str, known: dict[str, Path] | set[str]) -> str | None:
    """The module that an import's target lies in: `qtool.run` for `qtool.run.run`. None: none of ours."""
    while target not in known:
        target, dot, _ = target.rpartition(".")
        if not dot:
            return None
    return target


def room_of(module: str, stages: set[str]) -> str:
    """The stage that a module belongs to; "" for the root package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in stages else ""


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """Some circle of imports, its first module also last; [] where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(arrows.get(module, ())):
            if circle := walk(target, [*path, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in sorted(arrows) if (circle := walk(module, []))), [])
