"""A model with code of its own (as IQuest-Coder has): refused until the recipe allows it, then converted like any."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.source import resolve
from qtool.make.job import Job, open_job
from qtool.make.outputs import make_artifacts
from qtool.quantize.calibration import CalibrationSet
from qtool.recipe.sections import load_recipe

CONFIGURATION = """
from transformers import LlamaConfig

class IQuestCoderConfig(LlamaConfig):
    model_type = "iquestcoder"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_iquestcoder import IQuestCoderConfig

class IQuestCoderForCausalLM(LlamaForCausalLM):
    config_class = IQuestCoderConfig
"""


@pytest.fixture
def iquest(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny Llama under IQuest-Coder's names, with code of its own."""
    import transformers.dynamic_module_utils as modules

    cache = tmp_path / "modules"
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    folder = Path(shutil.copytree(tiny, tmp_path / "iquest"))
    (folder / "configuration_iquestcoder.py").write_text(CONFIGURATION)
    (folder / "modeling_iquestcoder.py").write_text(MODELING)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["IQuestCoderForCausalLM"],
        "model_type": "iquestcoder",
        "auto_map": {
            "AutoConfig": "configuration_iquestcoder.IQuestCoderConfig",
            "AutoModelForCausalLM": "modeling_iquestcoder.IQuestCoderForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def job_of(recipe: Path) -> Job:
    loaded = load_recipe(recipe)
    return open_job(loaded, resolve(loaded.model.id), torch.device("cpu"), loaded.outputs)


def test_refused_without_leave(iquest: Path, write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(QtoolError, match=r"auto_map.*trust_remote_code: true"):
        job_of(write_recipe(model=str(iquest)))


@pytest.mark.slow
def test_converted_with_leave_and_the_code_goes_along(
    iquest: Path, tiny: Path, write_recipe: Callable[..., Path]
) -> None:
    recipe = write_recipe(model={"id": str(iquest), "trust_remote_code": True})
    job = job_of(recipe)
    calibration = CalibrationSet(torch.randint(0, 320, (4, 48), generator=torch.Generator().manual_seed(0)), "test")
    artifact: Artifact = make_artifacts(job, calibration)["awq"]
    assert (artifact.path / "modeling_iquestcoder.py").read_text() == MODELING
    plain = job_of(write_recipe(outputs=[{"method": "awq", "group_size": 32, "name": "plain"}]))
    other = make_artifacts(plain, calibration)["plain"]
    for (name, tensor), (same, expected) in zip(artifact.read(), other.read(), strict=True):
        assert name == same
        assert torch.equal(tensor, expected), name
