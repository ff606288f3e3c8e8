"""Mixtures of experts in AWQ, GPTQ and compressed-tensors: keys, skip lists, loading rules, what verify finds."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import MIXTURES
from plain_rounding import nearest, rounded
from safetensors.torch import load_file, save_file

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.formats.codes import UniformCodes
from qtool.convert.models.shape import decoder_of
from qtool.convert.skeleton import load_config
from qtool.convert.verify.checks import verify
from qtool.convert.verify.verification import Check, Verification
from qtool.evaluate.engines.torch_model import load_model
from qtool.evaluate.engines.transformers import load_native
from qtool.quantize.grid import GridSpec
from qtool.report.card import Published, loading
from qtool.sizing.formats import weights_of
from qtool.sizing.headers import read_headers

CPU = torch.device("cpu")
OUTPUTS: list[dict[str, Any]] = [
    {"method": "awq", "name": "awq-g32", "group_size": 32, "dtype": "bfloat16"},
    {"method": "gptq", "name": "gptq-g32", "group_size": 32},
    {"method": "gptq", "name": "compressed-tensors-g32", "group_size": 32, "format": "compressed-tensors"},
    {"method": "gptq", "name": "asym", "group_size": 32, "format": "compressed-tensors", "sym": False},
]


@pytest.fixture(scope="module", params=MIXTURES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A model and its artifacts."""
    from small_models import make_model

    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(folder / "model", request.param, **MIXTURES[request.param])
    return model, rounded(model, OUTPUTS, folder)


@pytest.fixture(scope="module")
def verified(made: tuple[Path, dict[str, Path]]) -> dict[str, Verification]:
    """Artifact's name -> what verify says of it and its source."""
    model, paths = made
    return {name: verify(path, model) for name, path in paths.items()}


def _by_name(checks: Iterable[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@torch.inference_mode()
def test_every_expert_is_in_every_container(
    made: tuple[Path, dict[str, Path]], verified: dict[str, Verification]
) -> None:
    """Its codes read back bit for bit under its own name; the plan had its bytes; the model that is read runs."""
    model, paths = made
    source, headers = Checkpoint.open(model), read_headers(str(model))
    ids = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = load_model(source.read(), load_config(model), CPU)(ids).logits.log_softmax(-1)
    for name, path in paths.items():
        artifact = Artifact.open(path)
        assert artifact.manifest is not None
        decoder, made_as = decoder_of(artifact.config), artifact.manifest.output
        spec = GridSpec(4, 32, made_as.get("sym", False), getattr(torch, made_as["dtype"]))
        held = {module: (tensor, one) for tensor, pairs in decoder.held().items() for module, one in pairs}
        assert set(artifact.linears()) == set(held)
        for module, (tensor, matrix) in held.items():
            codes = artifact.codes(module)
            assert isinstance(codes, UniformCodes)
            assert codes.equals(nearest(matrix.of(source.tensor(tensor)), spec)), module
        result = verified[name]
        assert result.sound, [check for check in result.checks if check.status == "fail" and check.required]
        if name in ("awq-g32", "gptq-g32", "compressed-tensors-g32"):
            assert weights_of(headers, name).nbytes == artifact.manifest.tensor_bytes
        found = load_model(artifact.read(), load_config(path), CPU)(ids).logits.log_softmax(-1)
        assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 1.0, name


def test_skip_lists_have_full_names_of_what_is_there(made: tuple[Path, dict[str, Path]]) -> None:
    """Of routers and shared gates, in layers with experts alone; a name that is nobody's is a fault."""
    _, paths = made
    artifact = Artifact.open(paths["awq-g32"])
    said = artifact.quantization["modules_to_not_convert"]
    decoder = decoder_of(artifact.config)
    assert said == ["lm_head", *decoder.beside_experts()]
    family = decoder.family.name
    gates = decoder.shape.layers if family.startswith("Laguna") else 0
    projections = 2 if family.startswith("Qwen3_5") else 1 if family.startswith("Qwen3Next") else 0  # of a delta net
    routers = 2 if family.startswith(("Qwen2", "Qwen3_5", "Qwen3Next")) else 1  # with a shared expert's own gate
    assert len(said) == 1 + gates + projections + sum(decoder.shape.sparse) * routers
    assert {f"{name}.weight" for name in said[1:]} <= set(artifact.checkpoint.tensors)
    assert Artifact.open(paths["asym"]).quantization["ignore"] == said


def test_a_router_in_the_skip_list_of_nothing_is_named(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    _, paths = made
    folder = shutil.copytree(paths["awq-g32"], tmp_path / "awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].append("model.layers.7.mlp.gate")
    (folder / "config.json").write_text(json.dumps(config))
    check = _by_name(verify(folder).checks)["config.json"]
    assert check.status == "fail"
    assert "leaves model.layers.7.mlp.gate unquantized, and the model has no such module" in check.detail


def test_what_runtimes_make_of_experts_is_told(verified: dict[str, Verification]) -> None:
    """transformers loads AWQ and GPTQ with random experts, and says nothing; it fails on asymmetric experts."""
    checks = {name: _by_name(result.checks) for name, result in verified.items()}
    for name in ("awq-g32", "gptq-g32"):
        told = checks[name]["transformers 5.23: experts"]
        assert told.status == "fail"
        assert not told.required
        assert "experts of random numbers" in told.detail
    assert checks["compressed-tensors-g32"]["transformers 5.23: experts"].status == "pass"
    asym = checks["asym"]
    assert asym["transformers 5.23: experts"].status == "fail"
    assert asym["vLLM 0.32: Marlin kernel for experts, TP 1"].status == "pass"
    assert asym["vLLM 0.32: Marlin kernel for experts, TP 2"].status == "pass"
    four = asym["vLLM 0.32: Marlin kernel for experts, TP 4"]
    assert four.status == "fail"
    assert "experts 64 wide on 4 cards are 16 wide" in four.detail


def test_an_expert_left_in_16_bits_is_found(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    """At least 99 % of what is to be quantized is; experts count."""
    model, paths = made
    folder = shutil.copytree(paths["awq-g32"], tmp_path / "awq")
    decoder = decoder_of(json.loads((folder / "config.json").read_text()))
    assert decoder.family.mixture is not None
    module = decoder.at(decoder.shape.sparse.index(True)) + decoder.family.mixture.module(1, "down")
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        gone = [name for name in tensors if name.startswith(f"{module}.")]
        if gone:
            for name in gone:
                del tensors[name]
            tensors[f"{module}.weight"] = Checkpoint.open(model).tensor(f"{module}.weight")
            save_file(tensors, file, metadata={"format": "pt"})
    check = _by_name(verify(folder).checks)["quantized share"]
    assert check.status == "fail"
    assert re.search(rf"9\d\.\d% of what is to be quantized is; {re.escape(module)}\.weight stay", check.detail)


def test_nf4_is_refused_with_the_alternative(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    model, _ = made
    with pytest.raises(QtoolError, match=r"transformers cannot load experts in NF4 .* Take `method: gptq`"):
        rounded(model, [{"method": "nf4"}], tmp_path)
    with pytest.raises(QtoolError, match="transformers cannot load experts"):
        weights_of(read_headers(str(model)), "nf4")


def test_experts_of_unlike_shapes_and_missing_ones_are_named(model_maker: Callable[..., Path], tmp_path: Path) -> None:
    model = model_maker(tmp_path / "model", "Qwen3Moe", **MIXTURES["Qwen3Moe"])
    name = "model.layers.0.mlp.experts.4.up_proj.weight"
    for file in sorted(model.glob("*.safetensors")):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = tensors[name][:32].contiguous()
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QtoolError, match=re.escape(name)):
        rounded(model, OUTPUTS[:1], tmp_path)
    other = model_maker(tmp_path / "other", "Qwen3Moe", **MIXTURES["Qwen3Moe"])
    config = json.loads((other / "config.json").read_text())
    config["num_local_experts"] = 7
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match=r"model\.layers\.0\.mlp\.(gate|experts\.6)"):
        rounded(other, OUTPUTS[:1], tmp_path)


def test_transformers_own_loader_is_not_asked_for_what_it_gets_wrong(
    made: tuple[Path, dict[str, Path]], verified: dict[str, Verification]
) -> None:
    """It would answer with random experts, and say nothing: neither the engine nor a card offers it."""
    _, paths = made
    for name in ("awq-g32", "gptq-g32"):
        with pytest.raises(QtoolError, match="engine transformers: it holds all experts of a layer in one tensor"):
            load_native(paths[name], CPU)
    with pytest.raises(QtoolError, match="delivers no zero points to experts"):
        load_native(paths["asym"], CPU)
    for name, offered in (("awq-g32", False), ("compressed-tensors-g32", True), ("asym", False)):
        manifest = Artifact.open(paths[name]).manifest
        assert manifest is not None
        checks = tuple(verified[name].checks)
        ways = "\n".join(loading(Published(name, name, "", manifest, checks, ()), "org/model"))
        assert ("from_pretrained" in ways) is offered, name
        assert "vllm serve" in ways


def test_layers_that_guess_further_tokens_are_left_out(model_maker: Callable[..., Path], tmp_path: Path) -> None:
    """GLM's checkpoints hold one beyond the last: neither planned nor written, and verify does not miss it. The score
    bias and the router keep their dtypes."""
    model = model_maker(tmp_path / "model", "Glm4Moe", **MIXTURES["Glm4Moe"])
    planned = weights_of(read_headers(str(model)), "awq-g32").nbytes
    tensors = dict(Checkpoint.open(model).read())
    drafts = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in tensors.items() if ".layers.2." in name}
    for file in model.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors | drafts | {"model.layers.3.eh_proj.weight": torch.randn(128, 256)}, model / "model.safetensors")
    assert weights_of(read_headers(str(model)), "awq-g32").nbytes == planned
    (path,) = rounded(model, [{"method": "awq", "group_size": 32}], tmp_path).values()
    artifact = Artifact.open(path)
    assert not [name for name in artifact.checkpoint.tensors if ".layers.3." in name]
    result = verify(path, model)
    assert result.sound, [check for check in result.checks if check.status == "fail" and check.required]
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(artifact.checkpoint.tensor(bias), tensors[bias])
    assert artifact.checkpoint.tensors[bias].dtype == torch.float32
    assert artifact.checkpoint.tensors["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    assert any("left out, no part of Glm4MoeForCausalLM: model.layers.3." in note for note in artifact.notes)
    assert load_model(Checkpoint.open(model).read(), load_config(model), CPU) is not None
