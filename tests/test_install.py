"""What the package's layout promises: names, data files, and no shadowing of Hugging Face's `evaluate`."""

from __future__ import annotations

import importlib.util
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
