"""Budgets of AWQ and NF4: which linears stay in 16 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import make_model

from qtool import QtoolError
from qtool.convert.files.chosen import read_chosen
from qtool.convert.files.config_file import read_config
from qtool.convert.files.manifest import read_manifest
from qtool.convert.files.source import resolve
from qtool.convert.formats.plan import ModelShape
from qtool.convert.verify.checks import verify
from qtool.make import budgets
from qtool.make.job import Job, open_job
from qtool.make.output import plan_output
from qtool.make.outputs import make_artifacts
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.nf4 import Nf4Method
from qtool.quantize.methods.table import METHODS
from qtool.quantize.methods.two_kinds import FOUR, WHOLE
from qtool.quantize.rounding import factorize
from qtool.recipe.sections import checked_recipe
from qtool.report.job import print_budgets

TEXT = CalibrationSet(torch.randint(0, 320, (4, 48), generator=torch.Generator().manual_seed(0)), "test")
OUTPUTS: dict[str, dict[str, Any]] = {
    "awq": {"method": "awq", "group_size": 64, "rounding": "rtn", "scaling": "none", "descent": False},
    "nf4": {"method": "nf4", "rounding": "absmax"},
}
SKIPS = {"awq": "modules_to_not_convert", "nf4": "llm_int8_skip_modules"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("budget") / "m", hidden_size=128, intermediate_size=256)


def job_of(model: Path, folder: Path, name: str, **more: Any) -> Job:
    pytest.importorskip("bitsandbytes")
    data = {"model": str(model), "outputs": [OUTPUTS[name] | more], "output_dir": str(folder)}
    recipe = checked_recipe(data, "test")
    return open_job(recipe, resolve(str(model)), torch.device("cpu"), recipe.outputs)


@pytest.mark.parametrize("name", OUTPUTS)
def test_some_linears_stay_in_16_bits(name: str, model: Path, tmp_path: Path) -> None:
    """Those of one input alike, named in the container's own words; verified; known again by the plan."""
    job = budgets.decided(job_of(model, tmp_path, name, budget={"target_bpw": 9}), TEXT)
    (artifact,) = make_artifacts(job, TEXT).values()
    chosen, manifest = read_chosen(artifact.path), read_manifest(artifact.path)
    assert chosen is not None
    assert set(chosen.mix.values()) == {FOUR, WHOLE}
    assert 0.85 * 9 < 8 * manifest.tensor_bytes / manifest.parameters <= 9
    assert chosen.nbytes == manifest.tensor_bytes
    for layer in range(2):
        for kinds in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({chosen.mix[f"model.layers.{layer}.{kind}"] for kind in kinds}) == 1
    left = {module for module, kind in chosen.mix.items() if kind == WHOLE}
    assert set(manifest.output["ignore"]) == left
    section = json.loads((artifact.path / "config.json").read_text())["quantization_config"]
    assert left <= set(section[SKIPS[name]])
    assert verify(artifact.path).sound
    planned = budgets.known(job_of(model, tmp_path, name, budget={"target_bpw": 9}))
    assert planned.outputs[0].method == job.outputs[0].method


def test_nf4_with_exceptions_loads_in_transformers(model: Path, tmp_path: Path) -> None:
    """What is said in config.json is what transformers and bitsandbytes do: logits as qtool reads the folder."""
    transformers: Any = pytest.importorskip("transformers")
    job = budgets.decided(job_of(model, tmp_path, "nf4", budget={"target_bpw": 9}), TEXT)
    (artifact,) = make_artifacts(job, TEXT).values()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32).eval()
    chosen = read_chosen(artifact.path)
    assert chosen is not None
    for module, kind in chosen.mix.items():
        packed = type(loaded.get_submodule(module)).__name__ == "Linear4bit"
        assert packed == (kind == FOUR), module
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    weights = dict(artifact.read())
    state = {name: weights.get(name, one).to(one) for name, one in plain.state_dict().items()}
    up = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    exchanged = state | {up[0]: state[up[1]], up[1]: state[up[0]]}

    def divergence(tensors: dict[str, torch.Tensor]) -> float:
        plain.load_state_dict(tensors)
        with torch.inference_mode():
            ours, theirs = (one(TEXT.tokens[:1]).logits.float().log_softmax(-1) for one in (plain, loaded))
        return float((ours.exp() * (ours - theirs)).sum(-1).mean())

    assert divergence(state) < 1e-3  # its logits are bfloat16
    assert divergence(exchanged) > 10 * divergence(state)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_plan_names_the_type_of_every_linear(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a survey as after it: what is packed and what stays in 16 bits."""
    foreseen = job_of(model, tmp_path, name, budget={"target_bpw": 9})
    for job in (foreseen, budgets.decided(foreseen, TEXT)):
        print_budgets(job)
        left = sum(kind == WHOLE for kind in job.outputs[0].types.values())
        assert 0 < left < 14
        assert f"{name}: {left} matrices 16 bits, {14 - left} matrices 4 bits" in capsys.readouterr().out


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_nearest_size_that_is_named_works(name: str, model: Path, tmp_path: Path) -> None:
    """The file's header is counted at once, and a refusal names its output."""
    size = "0.2 MB"
    with pytest.raises(QtoolError, match=f"output '{name}': budget: max_size 0.2 MB is too small") as caught:
        job_of(model, tmp_path, name, budget={"max_size": size})
    size = caught.value.message.rstrip(".").rpartition("max_size ")[2]
    away = job_of(model, tmp_path, name, budget={"target_bpw": 9})
    method = METHODS[name].model_validate(OUTPUTS[name] | {"budget": {"max_size": "0.2 MB"}})
    shape = ModelShape(away.checkpoint.tensors, away.decoder, read_config(model))
    with pytest.raises(QtoolError, match=f"works: max_size {size}"):  # of a model whose headers alone are here
        plan_output(method, shape, tmp_path)
    job = budgets.decided(job_of(model, tmp_path, name, budget={"max_size": size}), TEXT)
    (artifact,) = make_artifacts(job, TEXT).values()
    assert (artifact.path / "model.safetensors").stat().st_size <= float(size.split()[0]) * 1e6
    with pytest.raises(QtoolError, match=f"output '{name}': budget: "):
        budgets.decided(job_of(model, tmp_path, name, budget={"max_kld": 1e-12}), TEXT)


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_cannot_be(name: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match=r"too small.*The nearest that works: target_bpw \d"):
        job_of(model, tmp_path, name, budget={"target_bpw": 3})
    with pytest.raises(QtoolError, match="`ignore` and `budget` both say"):
        job_of(model, tmp_path, name, budget={"target_bpw": 9}, ignore=["down_proj"])
    with pytest.raises(QtoolError, match="every linear in 16 bits"):
        METHODS[name].model_validate(OUTPUTS[name]).decided({"a": WHOLE})


@pytest.mark.parametrize("method", [AwqMethod(method="awq", group_size=64), Nf4Method(method="nf4")])
def test_a_trial_rounds_as_the_output_does(method: AwqMethod | Nf4Method) -> None:
    """Less is lost than by the nearest code, of one problem and of two; in 16 bits next to nothing."""
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 600, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    weight, gram = torch.randn(2, 16, 128, generator=generator) * 0.02, x.mT @ x
    plainer = {"descent": False, "clip": False} if method.method == "awq" else {"rounding": "absmax"}
    nearest = method.model_copy(update=plainer)

    def lost(one: AwqMethod | Nf4Method, kind: str) -> float:
        factor = factorize(gram, 0.1) if one.compensates else None
        error = one.trial(weight, kind, gram, factor) - weight
        return float(((error @ gram) * error).sum())

    assert lost(method, FOUR) < 0.9 * lost(nearest, FOUR)
    assert lost(method, WHOLE) < 1e-3 * lost(method, FOUR)
    alone = method.trial(weight[0], FOUR, gram[0], factorize(gram[0], 0.1))
    error = alone - weight[0]
    assert float(((error @ gram[0]) * error).sum()) < lost(method, FOUR)


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_without_a_budget_are_written_as_ever(name: str) -> None:
    assert "budget" not in METHODS[name].model_validate(OUTPUTS[name]).model_dump(mode="json")
