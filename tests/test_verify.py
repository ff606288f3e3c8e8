"""Planted faults: each is named by `verify`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import QtoolError
from qtool.convert import runtimes
from qtool.convert.artifact import MANIFEST, Artifact, file_entries, read_manifest
from qtool.convert.source import resolve
from qtool.convert.verify import Verification, verify
from qtool.outputs import make_artifacts, open_job
from qtool.quantize.calibration import CalibrationSet
from qtool.recipe import load_recipe


@pytest.fixture(scope="module")
def artifact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    path = folder / "recipe.yaml"
    path.write_text(f"model: {tiny}\noutputs: [{{method: awq, group_size: 32}}]\noutput_dir: {folder}/artifacts\n")
    recipe = load_recipe(path)
    job = open_job(recipe, resolve(recipe.model.id), torch.device("cpu"), recipe.outputs)
    tokens = torch.randint(0, 320, (6, 48), generator=torch.Generator().manual_seed(0))
    return make_artifacts(job, recipe.outputs, CalibrationSet(tokens, "test"))["awq"].path


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], resign: bool = True) -> None:
    """Edit one tensor; ``resign`` renews the manifest's sha256, as a writer with a bug would have."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, metadata={"format": "pt"})
    if resign:
        sign(folder)


def sign(folder: Path) -> None:
    manifest = read_manifest(folder).model_copy(update={"files": file_entries(folder)})
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def failures(result: Verification) -> str:
    return "\n".join(f"{c.name}: {c.detail}" for c in result.checks if c.status == "fail" and c.required)


def test_a_good_artifact_is_sound_and_unmade_checks_are_listed(artifact: Path, tiny: Path) -> None:
    result = verify(artifact)
    assert result.sound
    assert [c.name for c in result.checks if c.status == "not made"] == ["error against the source"]
    assert verify(artifact, tiny).sound
    assert not [c for c in verify(artifact, tiny).checks if c.status == "not made"]


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            del config["quantization_config"][key]
        else:
            config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)


Q = "model.layers.1.mlp.up_proj"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing file": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "one flipped bit": (
        lambda p: change_tensor(p, f"{Q}.qweight", lambda t: t ^ 1, resign=False),
        "model.safetensors has changed (sha256)",
    ),
    "shorter file": (lambda p: (p / "config.json").write_text("{}"), "config.json has 2 bytes"),
    "a stranger among the weights": (
        lambda p: save_file({"x": torch.zeros(1)}, p / "extra.safetensors"), "extra.safetensors is not in the manifest",
    ),
    "NaN": (
        lambda p: change_tensor(p, "model.norm.weight", lambda t: t * float("nan")),
        "model.norm.weight holds NaN or Inf",
    ),
    "zero scale": (lambda p: change_tensor(p, f"{Q}.scales", lambda t: t * 0), f"{Q}.scales holds zeros"),
    "wrong shape": (
        lambda p: change_tensor(p, f"{Q}.qzeros", lambda t: t[:-1]),
        f"{Q}.qzeros has shape [3, 32], expected [4, 32]",
    ),
    "lost key": (lambda p: edit_config(p, zero_point=None), "quantization_config lacks 'zero_point'"),
    "wrong group size": (lambda p: edit_config(p, group_size=64), "config.json says group_size 64"),
    "wrong version": (lambda p: edit_config(p, version="gemv"), "version is 'gemv'"),
    "wrong bits": (lambda p: edit_config(p, bits=8), "bits is 8"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_named(fault: str, copy: Path) -> None:
    plant, expected = FAULTS[fault]
    plant(copy)
    result = verify(copy)
    assert not result.sound
    assert expected in failures(result)


def test_codes_of_another_linear_pass_everything_but_the_source(copy: Path, tiny: Path) -> None:
    """Well-formed and wrong: only the error against the source can tell."""
    other = load_file(copy / "model.safetensors")[f"{Q.replace('up', 'gate')}.qweight"]
    change_tensor(copy, f"{Q}.qweight", lambda _: other)
    assert verify(copy).sound
    result = verify(copy, tiny)
    assert not result.sound
    assert f"{Q}: |W - Ŵ|/|W| is" in failures(result)


def test_only_qtools_artifacts_can_be_verified(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    with pytest.raises(QtoolError, match=r"no qtool\.json"):
        verify(copy)
    assert Artifact.open(copy).manifest is None


def test_a_broken_manifest_is_named(copy: Path) -> None:
    (copy / MANIFEST).write_text('{"qtool": 1}')
    with pytest.raises(QtoolError, match=r"qtool\.json: not a manifest"):
        verify(copy)


CONFIG = {
    "num_attention_heads": 32, "num_key_value_heads": 8,
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
}  # fmt: skip
LLAMA_8B = {
    "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336),
}  # fmt: skip


def broken(runtime: str, rule: str, tp: int, linears: dict[str, tuple[int, int]], **quantization: Any) -> list[str]:
    config = CONFIG | {"quantization_config": {**CONFIG["quantization_config"], **quantization}}  # type: ignore[dict-item]
    subject = runtimes.Subject(config, linears)
    found = next(r for r in runtimes.AWQ_RULES if (r.runtime, r.name) == (runtime, rule))
    return list(found.broken(subject, tp))


def test_runtime_rules() -> None:
    for tp in runtimes.TENSOR_PARALLEL:
        assert not broken("vLLM", "plain kernel", tp, LLAMA_8B)
        assert not broken("vLLM", "Marlin kernel", tp, LLAMA_8B)
    assert broken("vLLM", "Marlin kernel", 1, LLAMA_8B | {"q_proj": (4096, 4160)}, group_size=32) == [
        "q_proj: in 4160 is not a multiple of 128"
    ]
    assert broken("vLLM", "Marlin kernel", 1, LLAMA_8B, group_size=16)[0].startswith("group_size 16")
    assert broken("vLLM", "Marlin kernel", 1, LLAMA_8B, zero_point=False) == ["zero_point is not true"]
    # 18944 = 148 * 128: its eighth is no multiple of the group
    assert broken("vLLM", "plain kernel", 8, LLAMA_8B | {"down_proj": (3584, 18944)}) == [
        "down_proj: in 2368 is not a multiple of the group size 128"
    ]
    assert broken("vLLM", "plain kernel", 1, LLAMA_8B | {"k_proj": (1020, 4096)}) == [
        "k_proj: out 1020 is not a multiple of 8"
    ]
