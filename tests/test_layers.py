"""The direction of imports (which folder may know which), read from the source with ast."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "convert": {"convert"},
    "quantize": {"quantize", "convert"},
    "evaluate": {"evaluate", "convert"},
}
STAGES = {"convert", "quantize", "evaluate", "recipes"}


def imports(path: Path) -> set[str]:
    """First component below `qtool` of every import; "" for `qtool` itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "qtool"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qtool":
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "qtool"
                else {node.module or ""}
            )
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
    return {name.split(".")[1] if "." in name else "" for name in found}


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_a_stage_imports_only_what_lies_before_it(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        strangers = imports(path) - MAY_IMPORT[folder] - {"QtoolError"}
        assert not strangers, f"{path.name} imports {strangers}"


def test_the_root_package_is_only_the_error() -> None:
    tree = ast.parse((ROOT / "pipeline/__init__.py").read_text(encoding="utf-8"))
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == ["QtoolError"]
    assert not imports(ROOT / "pipeline/__init__.py")


def test_scripts_are_imported_by_nobody() -> None:
    for folder in ("pipeline", *MAY_IMPORT):
        for path in (ROOT / folder).glob("*.py"):
            assert "scripts" not in path.read_text(encoding="utf-8").split("import ", 1)[-1].split("\n")[0]


def test_no_stage_folder_is_a_package_of_its_own() -> None:
    """With an __init__.py, ./evaluate would shadow Hugging Face's evaluate under `python -m pytest`."""
    for folder in (*STAGES, "tests"):
        assert not (ROOT / folder / "__init__.py").exists()
