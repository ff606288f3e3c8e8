"""What every test shares. Nothing imports this file: pytest runs it once, and a second run would set a second Hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from environment import make_neutral

HUB = tempfile.mkdtemp(prefix="qtool-tests-hub-")
make_neutral(os.environ, HUB)  # before the libraries that read it once, when they are imported

import torch  # noqa: E402  # after the environment is neutral
from small_models import PROBLEM, TEXT, make_model  # noqa: E402  # imports torch


def pytest_unconfigure() -> None:
    shutil.rmtree(HUB, ignore_errors=True)


# where no accelerator is, torch.manual_seed would note a stack for each that may come: a millisecond before every test
SEED = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers in every run and in any order."""
    SEED(0)


@pytest.fixture(autouse=True, scope="session")
def quick_disk() -> Iterator[None]:
    """Files need not outlive a power cut here: waiting for the disk took half of the suite's time."""
    real, os.fsync = os.fsync, lambda descriptor: None  # type: ignore[assignment]  # takes what os.fsync takes
    yield
    os.fsync = real


@pytest.fixture(scope="session")
def model_maker() -> Callable[..., Path]:
    """`make_model`, for tests that need a model of their own."""
    return make_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in several shards."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Text long enough for a few windows."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def write_recipe(tmp_path: Path, tiny: Path, text_file: Path) -> Callable[..., Path]:
    """``write_recipe(key=value…)`` writes a small recipe for `tiny` (YAML values replace its sections)."""
    import yaml

    def write(**changes: Any) -> Path:
        recipe: dict[str, Any] = {
            "model": str(tiny),
            "calibration": {"text": str(text_file), "samples": 8, "length": 64},
            "outputs": [{"method": "awq", "group_size": 32}],
            "output_dir": str(tmp_path / "artifacts"),
        }
        recipe |= changes
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
        return path

    return write


@pytest.fixture(scope="session")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of two outputs with a gate, a task and a text."""
    import yaml

    from qtool.run import run

    folder = tmp_path_factory.mktemp("record")
    (folder / "text.txt").write_text("".join(f"def f{i}(a, b):\n    return a * {i} + b\n" for i in range(200)))
    (folder / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    recipe: dict[str, Any] = {
        "model": str(tiny),
        "calibration": {"text": str(folder / "text.txt"), "samples": 4, "length": 32},
        "outputs": [{"method": "awq", "group_size": 32}, {"method": "nf4"}],
        "evaluate": {
            "tasks": [{"task": str(folder / "problems.jsonl")}], "max_new_tokens": 4,
            "text": {"text": str(folder / "text.txt"), "samples": 3, "length": 32, "seed": 3},
        },
        "gates": [{"max_kld": 5.0}],
        "output_dir": str(folder / "artifacts"),
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run(folder / "recipe.yaml", folder / "runs", "cpu")


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A Hub on 127.0.0.1 that the real client talks to, logged in with a planted token; waiting takes no time, and how
    long it would have been is in ``waits``."""
    import time

    import huggingface_hub.constants as constants
    import huggingface_hub.hf_api as hf_api
    from hub_server import TOKEN, serve

    for running in serve():
        running.waits = []
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(hf_api.api, "endpoint", running.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", running.waits.append)
        yield running
