"""NF4: bitsandbytes' own bytes, read back without it, and loaded by transformers as its users load it."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.source import resolve
from qtool.convert.formats import bnb_nf4
from qtool.convert.formats.codes import Nf4Blocks
from qtool.convert.models.feeds import Feed, Nothing, whole
from qtool.convert.skeleton import load_config
from qtool.evaluate.engines.torch_model import load_model
from qtool.make.job import open_job
from qtool.make.outputs import make_artifacts
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.method import Inputs, Layer
from qtool.quantize.methods.nf4 import Nf4Method, quantize_nf4
from qtool.quantize.statistics import InputStatistics
from qtool.recipe.sections import load_recipe

functional: Any = pytest.importorskip("bitsandbytes.functional")
TOKENS = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double_quant", [True, False])
# not (96, 160): bitsandbytes' kernel for AVX512 reads rows of broken blocks wrongly (0.50.2), which verify's rules name
@pytest.mark.parametrize("shape", [(96, 192), (33, 50)])
def test_equals_bitsandbytes(dtype: torch.dtype, double_quant: bool, shape: tuple[int, int]) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    blocks = quantize_nf4(weight, 64, double_quant)
    assert torch.equal(blocks.dequantize(dtype), functional.dequantize_4bit(packed, state))
    section = bnb_nf4.quantization_config(double_quant, ["lm_head"])
    ours = bnb_nf4.pack(blocks, section)
    theirs = {"weight": packed} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        if name != bnb_nf4.MARK:
            assert torch.equal(ours[name], tensor), name
    assert json.loads(bytes(ours[bnb_nf4.MARK].tolist())) == json.loads(bytes(theirs[bnb_nf4.MARK].tolist()))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in ours.items()} == bnb_nf4.specs(*shape, section, dtype)
    read = bnb_nf4.unpack(ours, section)
    assert read.equals(blocks)
    assert not read.equals(replace(blocks, block=128))


def test_first_of_two_weights_is_in_the_high_nibble() -> None:
    """1 is the last and -1 the first entry of the table."""
    blocks = quantize_nf4(torch.tensor([[1.0, -1.0] * 32]), 64, False)
    assert set(blocks.packed.flatten().tolist()) == {0xF0}
    assert blocks.absmax.tolist() == [1.0]


@pytest.fixture(scope="module", params=[True, False], ids=["double", "single"])
def artifact(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("nf4")
    path = folder / "recipe.yaml"
    double = str(request.param).lower()
    output = f"{{method: nf4, rounding: absmax, double_quant: {double}}}"
    path.write_text(f"model: {tiny}\noutputs: [{output}]\noutput_dir: {folder}/artifacts\n")
    recipe = load_recipe(path)
    job = open_job(recipe, resolve(recipe.model.id), torch.device("cpu"), recipe.outputs)
    return make_artifacts(job, CalibrationSet(TOKENS, "test"))["nf4"]


@pytest.fixture(scope="module", params=[True, False], ids=["double", "single"])
def pair(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, ...]:
    """(by descent in a stream of its own, by largest magnitudes, by descent on the source's inputs)."""
    folder = tmp_path_factory.mktemp("nf4-pair")
    outputs = [
        {"method": "nf4", "name": "own", "double_quant": request.param},
        {"method": "nf4", "name": "absmax", "rounding": "absmax", "double_quant": request.param},
        {"method": "nf4", "name": "source", "propagate_error": False, "double_quant": request.param},
    ]
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"model": str(tiny), "outputs": outputs, "output_dir": str(folder / "artifacts")}))
    recipe = load_recipe(path)
    job = open_job(recipe, resolve(recipe.model.id), torch.device("cpu"), recipe.outputs)
    tokens = torch.randint(0, 320, (8, 48), generator=torch.Generator().manual_seed(0))
    made = make_artifacts(job, CalibrationSet(tokens, "test"))
    return made["own"], made["absmax"], made["source"]


def test_descent_is_laid_out_as_largest_magnitudes_are(pair: tuple[Artifact, ...]) -> None:
    ours, theirs = (artifact.checkpoint.tensors for artifact in pair[:2])
    assert {name: (info.dtype, info.shape) for name, info in ours.items()} == {
        name: (info.dtype, info.shape) for name, info in theirs.items()
    }
    configs = [json.loads((artifact.path / "config.json").read_text()) for artifact in pair]
    assert configs[0] == configs[1]


def test_bitsandbytes_reads_what_descent_wrote(pair: tuple[Artifact, ...]) -> None:
    """Its own dequantization of the stored tensors: the very values that qtool reads."""
    artifact = pair[0]
    for linear in artifact.linears():
        codes = artifact.codes(linear)
        assert isinstance(codes, Nf4Blocks)
        at = f"{linear}.weight"
        stored = {name: artifact.checkpoint.tensor(name) for name in artifact.checkpoint.tensors if name.startswith(at)}
        packed = stored.pop(at)
        state = functional.QuantState.from_dict(stored, device=torch.device("cpu"))
        read = functional.dequantize_4bit(packed, state)
        assert torch.equal(read, codes.dequantize(read.dtype)), linear


def test_descent_loses_less_than_largest_magnitudes(pair: tuple[Artifact, ...]) -> None:
    """For every matrix, on the source's inputs; while the weights themselves move further away. In a stream of its own
    the target is another: there the first matrices say it, whose inputs are the source's."""
    own, absmax, source = (artifact.manifest for artifact in pair)
    assert own is not None
    assert absmax is not None
    assert source is not None
    ledger, plain = source.ledger, absmax.ledger
    for linear in ("q_proj", "k_proj", "v_proj"):
        record = own.ledger[f"model.layers.0.self_attn.{linear}"]
        assert record == ledger[f"model.layers.0.self_attn.{linear}"]
    assert set(ledger) == set(pair[0].linears())
    for linear, record in ledger.items():
        assert record["error"] < record["rtn_error"], linear
    assert all(record["frobenius"] > plain[linear]["frobenius"] for linear, record in ledger.items())


def test_rows_that_end_inside_a_block_are_bitsandbytes_own() -> None:
    method, matrix = Nf4Method(method="nf4"), whole("up")
    weight, x = torch.randn(33, 50), torch.randn(200, 50)
    stats = InputStatistics()
    stats.add(x)
    stats.finish()
    layer = Layer(0, (Feed(Nothing(), (matrix,)),), (matrix,), {}, {"up.weight": weight}, {}, torch.device("cpu"))
    codes = method.quantize(layer, Inputs({"up": stats})).codes["up"]
    assert codes.equals(quantize_nf4(weight, 64, True))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS).logits.float()
    return found


def reference(artifact: Artifact, exact: bool = False) -> Any:
    """The reference engine; ``exact``: on weights that were not rounded to the source's bfloat16 after dequantizing."""
    state = dict(artifact.read())
    for linear in artifact.linears():
        codes = artifact.codes(linear)
        assert isinstance(codes, Nf4Blocks)
        if exact:
            state[f"{linear}.weight"] = replace(codes, dtype=torch.float32).dequantize()
    return load_model(iter(state.items()), load_config(artifact.path), torch.device("cpu"))


def test_transformers_loads_it(artifact: Artifact) -> None:
    """In bfloat16, the default: as near to the reference as the reference's own bfloat16. In float32, where
    bitsandbytes multiplies with unrounded weights: the same numbers."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(artifact.path).eval()
    quantized = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(quantized) == len(artifact.linears()) == 14
    assert model.dtype == quantized[0].compute_dtype == torch.bfloat16
    expected = logits(reference(artifact))
    plain = (logits(reference(artifact).to(torch.bfloat16)) - expected).norm()
    # where processors have bfloat16, bitsandbytes rounds the block maxima to it as well
    assert (logits(model) - expected).norm() <= (2 if functional.has_avx512bf16() else 1.5) * plain
    if functional.has_avx512bf16():
        return  # its kernel for such processors computes in bfloat16 whatever is asked
    for module in quantized:
        module.compute_dtype = torch.float32
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    exact = logits(reference(artifact, exact=True))
    assert (logits(model) - exact).norm() <= 1e-4 * exact.norm()


def test_everything_else_is_the_sources(artifact: Artifact, tiny: Path) -> None:
    source = Checkpoint.open(tiny)
    linears = {f"{linear}.weight" for linear in artifact.linears()}
    read = dict(artifact.read())
    assert set(read) == set(source.tensors)
    for name, tensor in source.read():
        if name in linears:
            assert 0 < (read[name] - tensor.float()).norm() < 0.15 * tensor.float().norm()
        else:
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)
    config = json.loads((artifact.path / "config.json").read_text())
    section = config.pop("quantization_config")
    assert section["bnb_4bit_quant_type"] == "nf4"
    assert config.pop("torch_dtype") == config["dtype"]  # for readers of either key
    assert config == json.loads((tiny / "config.json").read_text())
    assert artifact.manifest is not None
    assert artifact.manifest.calibration == {}
    assert "bitsandbytes" in artifact.manifest.versions


def test_without_bitsandbytes(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    recipe = load_recipe(write_recipe(outputs=[{"method": "nf4"}]))
    with pytest.raises(QtoolError, match=r"pip install 'qtool-llm\[nf4\]'") as error:
        open_job(recipe, resolve(recipe.model.id), torch.device("cpu"), recipe.outputs)
    assert error.value.exit_code == 3
