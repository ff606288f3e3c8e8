"""What the package's layout promises: names, data files, and no shadowing of Hugging Face's `evaluate`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_everything_imports_below_qtool() -> None:
    for folder, package in (
        ("pipeline", "qtool"), ("convert", "qtool.convert"), ("quantize", "qtool.quantize"),
        ("evaluate", "qtool.evaluate"),
    ):  # fmt: skip
        for path in (ROOT / folder).rglob("*.py"):
            below = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in below if part != "__init__")])
            assert importlib.util.find_spec(name), f"{path}: install again after adding a file"


def test_top_level_names_stay_free() -> None:
    """`import evaluate` must find Hugging Face's package or nothing, never ours."""
    for name in ("evaluate", "convert", "quantize"):
        spec = importlib.util.find_spec(name)
        assert spec is None or not str(spec.origin or "").startswith(str(ROOT))


def test_data_is_part_of_the_package() -> None:
    for package, name in (
        ("qtool.quantize", "data/calibration.jsonl"), ("qtool.evaluate", "data/handwritten.jsonl"),
        ("qtool.evaluate", "data/heldout_code.jsonl"), ("qtool.evaluate", "data/heldout.jsonl.gz"),
        ("qtool", "data/demo-model/config.json"), ("qtool", "data/accelerators.yaml"),
    ):  # fmt: skip
        assert files(package).joinpath(name).is_file(), name


def test_pins_satisfy_the_lower_bounds() -> None:
    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text


def test_the_source_archive_is_the_whole_project() -> None:
    """Every folder and file of the project's root is packed, or is named here."""
    packed = (ROOT / "MANIFEST.in").read_text().split()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    tops = {line.split("/")[0] for line in tracked.splitlines()}
    packages = {"pipeline", "convert", "quantize", "evaluate", "recipes"}  # setuptools packs these, README and LICENSE
    left_out = {".gitignore", ".dockerignore", "MANIFEST.in", "LICENSE", "README.md", "pyproject.toml", *packages}
    assert tops - left_out <= set(packed)


def test_extras_of_ended_projects_are_refused_beside_qtool() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = next(Requirement(text) for text in project["dependencies"] if text.startswith("transformers"))
    for extra, pinned in (("autoawq", "autoawq==0.2.9"), ("auto-gptq", "auto-gptq==0.7.1")):
        needs = [Requirement(text) for text in project["optional-dependencies"][extra]]
        assert str(needs[0]) == pinned
        theirs = next(need for need in needs if need.name == "transformers").specifier
        versions = ["4.40.0", "4.51.3", "5.17.0", "5.23.0"]
        assert not [v for v in versions if v in theirs and v in own.specifier]
        assert [v for v in versions if v in theirs]


def test_shells_complete_commands_and_recipes() -> None:
    for words, begun, expected in (("qtool ru", 1, "run"), ("qtool run aw", 2, "awq"), ("qtool recipes de", 2, "demo")):
        environment = os.environ | {
            "_QTOOL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(begun),
        }  # fmt: skip
        command = [sys.executable, "-P", "-c", "from qtool.cli import main; main(prog_name='qtool')"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert f"plain,{expected}" in done.stdout.splitlines(), done.stderr
