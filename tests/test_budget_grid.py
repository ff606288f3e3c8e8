"""Budgets of GPTQ and compressed-tensors: bits and groups for each linear, alike where vLLM holds several in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import make_model

from qtool import QtoolError
from qtool.convert.files.chosen import read_chosen
from qtool.convert.files.manifest import read_manifest
from qtool.convert.files.reading import read_json
from qtool.convert.files.source import resolve
from qtool.convert.verify.checks import verify
from qtool.make import budgets
from qtool.make.job import Job, open_job
from qtool.make.mixes import apart, joined
from qtool.make.output import Output
from qtool.make.outputs import make_artifacts
from qtool.quantize import allocation
from qtool.quantize.allocation import Choice
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.gptq import CHOICES, WHOLE, GptqMethod
from qtool.recipe.sections import checked_recipe

TEXT = CalibrationSet(torch.randint(0, 320, (4, 48), generator=torch.Generator().manual_seed(0)), "test")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its rows divide into groups of 128."""
    return make_model(tmp_path_factory.mktemp("budget") / "wide", hidden_size=256, intermediate_size=512)


def job_of(model: Path, folder: Path, **output: Any) -> Job:
    wanted = {"method": "gptq", "descent": False, "propagate_error": False, **output}
    recipe = checked_recipe({"model": str(model), "outputs": [wanted], "output_dir": str(folder)}, "test")
    return open_job(recipe, resolve(str(model)), torch.device("cpu"), recipe.outputs)


def test_groups_get_one_type() -> None:
    """The best mix in which a and b are alike, though each alone would choose otherwise."""
    offers = {
        "a": [Choice("four", 4, 1.0), Choice("eight", 8, 0.0)],
        "b": [Choice("four", 4, 9.0), Choice("eight", 8, 0.0)],
        "c": [Choice("four", 4, 5.0), Choice("eight", 8, 0.0)],
    }
    alike = [["a", "b"], ["other"]]
    free = allocation.cheapest(offers, 20)
    assert free is not None
    assert [free[one].type for one in "abc"] == ["four", "eight", "eight"]
    found = allocation.cheapest(joined(offers, alike), 20)
    assert found is not None
    assert apart(found, offers, alike) == {"a": "eight", "b": "eight", "c": "four"}


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_bits_and_groups_for_each_linear(model: Path, tmp_path: Path, form: str) -> None:
    job = budgets.decided(job_of(model, tmp_path, format=form, budget={"target_bpw": 7.5}), TEXT)
    (artifact,) = make_artifacts(job, TEXT).values()
    chosen, manifest = read_chosen(artifact.path), read_manifest(artifact.path)
    assert chosen is not None
    assert 0.95 * 7.5 < 8 * manifest.tensor_bytes / manifest.parameters <= 7.5
    assert chosen.nbytes == manifest.tensor_bytes
    assert len(set(chosen.mix.values())) > 1
    for layer in range(2):
        for kinds in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({chosen.mix[f"model.layers.{layer}.{kind}"] for kind in kinds}) == 1
    assert verify(artifact.path).sound
    section = read_json(artifact.path / "config.json")["quantization_config"]
    assert len(section["dynamic"] if form == "gptq" else section["config_groups"]) >= 1
    for module, kind in chosen.mix.items():  # what is stored has the bits that were chosen
        codes = artifact.weights.stored()
        assert (f"{module}.weight" in codes) == (kind == WHOLE)
    planned = budgets.known(job_of(model, tmp_path, format=form, budget={"target_bpw": 7.5}))
    assert planned.outputs[0].method == job.outputs[0].method


def test_no_file_is_above_its_budget(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that the tensors of a mix fill with the header of the smallest mix: its own is some digits longer."""
    smallest = job_of(model, tmp_path, budget={"target_bpw": 5.3}).outputs[0]
    offers = smallest.method.offers(budgets._shape(job_of(model, tmp_path)))
    costs = {module: {kind: 1e6 / size for kind, size in own.items()} for module, own in offers.items()}
    monkeypatch.setattr(budgets, "_kept", lambda *_: budgets.Measured(made_from="", costs=costs))
    for bits in (6, 7, 8, 9, 10):
        tensors = budgets.known(job_of(model, tmp_path, budget={"target_bpw": bits})).outputs[0].plan.nbytes
        size = tensors + file_bytes(smallest) - smallest.plan.nbytes
        found = budgets.known(job_of(model, tmp_path, budget={"max_size": f"{size / 1e6:.6f} MB"})).outputs[0]
        assert 0.98 * size < file_bytes(found) <= size


def file_bytes(output: Output) -> int:
    found = output.container.file_bytes(output.plan)
    assert found is not None
    return found


def test_what_was_chosen_is_said_in_public_keys() -> None:
    method = GptqMethod(method="gptq", budget={"target_bpw": 5})  # type: ignore[arg-type]  # pydantic makes it one
    decided = method.decided({"a": "int4-g128", "b": "int8-g128", "c": WHOLE, "d": "int4-g32"})
    told = decided.model_dump(mode="json")
    assert (told["bits"], told["group_size"], told["ignore"]) == (4, 128, ["c"])
    assert told["modules"] == {"b": {"bits": 8, "group_size": 128}, "d": {"bits": 4, "group_size": 32}}
    assert "budget" not in told
    assert GptqMethod.model_validate(told) == decided
    assert next(iter(CHOICES)) == "int4-g128"


def test_outputs_without_a_budget_are_written_as_ever() -> None:
    assert "budget" not in GptqMethod(method="gptq").model_dump(mode="json")


def test_bad_budgets(model: Path, tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match=r"too small.*The nearest that works: target_bpw 5\.\d+"):
        job_of(model, tmp_path, budget={"target_bpw": 3})
    with pytest.raises(QtoolError, match="`bits` and `budget` both say"):
        job_of(model, tmp_path, bits=8, budget={"target_bpw": 6})
