"""Mixtures of experts that are damaged: each fault is planted, and named in one line before or at its layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_files import fused_copy, fused_tensors
from moe_models import MIXTURES
from small_models import converted
from torch import Tensor

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint

AWQ: dict[str, Any] = {"method": "awq", "group_size": 32, "dtype": "bfloat16"}
GPTQ: dict[str, Any] = {"method": "gptq", "group_size": 32, "dtype": "bfloat16"}
Q8: dict[str, Any] = {"method": "gguf", "type": "Q8_0"}
EXPERT = "model.layers.2.mlp.experts.4"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from small_models import make_model

    changes = MIXTURES["Qwen3Moe"] | {"mlp_only_layers": []}
    return make_model(tmp_path_factory.mktemp("bad") / "model", "Qwen3Moe", **changes)


def changed(model: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the model in one shard, its tensors changed."""
    tensors = dict(Checkpoint.open(model).read())
    change(tensors)
    return fused_copy(model, folder / "model", tensors=tensors)


def said(folder: Path, outputs: list[dict[str, Any]]) -> str:
    """The one line by which a model is refused; nothing of an artifact is left under its name."""
    with pytest.raises(QtoolError) as raised:
        converted(folder, outputs, folder.parent)
    message = str(raised.value)
    assert "\n" not in message
    assert not [path for path in (folder.parent / "artifacts").glob("*") if not path.name.endswith(".partial")]
    return message


def test_an_expert_of_another_shape(model: Path, tmp_path: Path) -> None:
    name = f"{EXPERT}.up_proj.weight"

    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:32].clone()

    message = said(changed(model, tmp_path, narrow), [AWQ])
    assert f"{name} has shape [32, 128], but config.json implies [64, 128]" in message


def test_a_missing_expert(model: Path, tmp_path: Path) -> None:
    name = f"{EXPERT}.down_proj.weight"
    message = said(changed(model, tmp_path, lambda tensors: tensors.__delitem__(name)), [AWQ])
    assert f"config.json implies a tensor {name}, which no shard holds" in message


def test_an_expert_too_many(model: Path, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.6.up_proj.weight"

    def more(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.ones(64, 128, dtype=torch.bfloat16)

    assert f"holds {name} (1 such), which config.json does not imply" in said(changed(model, tmp_path, more), [AWQ])


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [[AWQ], [GPTQ], [Q8]])
def test_nan_in_one_expert(outputs: list[dict[str, Any]], model: Path, tmp_path: Path) -> None:
    """Of files that hold it alone, and of fused ones: the expert is named, not the tensor of all."""
    name = f"{EXPERT}.up_proj.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][3, 5] = torch.nan

    assert f"{name}: the source weight holds NaN or Inf" in said(changed(model, tmp_path / "alone", spoil), outputs)
    stacks = fused_tensors(model, transposed=True)
    stacks["model.layers.2.mlp.experts.gate_up_proj"][4, 5, 64 + 3] = torch.inf
    folder = fused_copy(model, tmp_path / "fused" / "model", tensors=stacks)
    assert f"{name}: the source weight holds NaN or Inf" in said(folder, outputs)


def test_an_expert_of_zeros(model: Path, tmp_path: Path) -> None:
    name = f"{EXPERT}.gate_proj.weight"

    def erase(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros_like(tensors[name])

    assert f"{name}: the source weight is all zero" in said(changed(model, tmp_path, erase), [AWQ])


@pytest.mark.parametrize("outputs", [[AWQ], [GPTQ], [{"method": "gguf", "type": "Q4_K_M", "rounding": "ggml"}]])
def test_an_expert_whose_work_is_no_number(outputs: list[dict[str, Any]], model: Path, tmp_path: Path) -> None:
    """Weights that are numbers, whose products are not: the expert's own input of down is named, in every stream."""

    def loud(tensors: dict[str, Tensor]) -> None:
        for part in ("gate_proj", "up_proj"):
            tensors[f"{EXPERT}.{part}.weight"] = tensors[f"{EXPERT}.{part}.weight"] * 1e30

    message = said(changed(model, tmp_path, loud), outputs)
    assert f"model.layers.2: the input of {EXPERT[15:]}.down_proj is NaN or Inf on the calibration text" in message


@pytest.mark.slow
@pytest.mark.parametrize("output", [AWQ, GPTQ, {"method": "gguf", "type": "Q4_K_M"}])
def test_an_expert_that_no_token_reached(output: dict[str, Any], tmp_path: Path) -> None:
    """A router that never chooses it: it is quantized all the same, and the artifact says which it was."""
    from small_models import make_model

    changes = MIXTURES["Qwen3Moe"] | {"mlp_only_layers": []}
    wide = {"hidden_size": 256, "moe_intermediate_size": 256} if output["method"] == "gguf" else {}
    model = make_model(tmp_path / "wide", "Qwen3Moe", **changes | wide)
    router = "model.layers.1.mlp.gate.weight"

    def avoid(tensors: dict[str, Tensor]) -> None:
        rows = tensors[router]
        # of two opposite rows one always says more than nothing: two such pairs leave expert 3 no token
        tensors[router] = torch.stack([rows[0], -rows[0], rows[2], torch.zeros_like(rows[3]), -rows[2], rows[5]])

    (path,) = converted(changed(model, tmp_path, avoid), [output], tmp_path).values()
    manifest = Artifact.open(path).manifest
    assert manifest is not None
    (note,) = [note for note in manifest.notes if "saw none" in note]
    assert re.fullmatch(r"of the experts 1 saw none \(layer 1, expert 3\): they are rounded for .*", note)
    for part in ("gate_proj", "up_proj", "down_proj"):
        record = manifest.ledger[f"model.layers.1.mlp.experts.3.{part}"]
        assert (record["tokens"], record["blended"]) == (0, 1)
        assert 0 < record["error"] < 0.5
