"""GPTQ and compressed-tensors files as literal words, through their own readers where those are installed, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.folder import write_json
from qtool.convert.files.source import resolve
from qtool.convert.formats import autogptq, compressed_tensors, packing
from qtool.convert.formats.codes import UniformCodes
from qtool.convert.formats.table import FORMATS, container_of, format_of, runs_in
from qtool.convert.skeleton import load_config
from qtool.evaluate.engines.torch_model import load_model
from qtool.make.job import open_job
from qtool.make.outputs import make_artifacts
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.table import METHODS
from qtool.recipe.sections import load_recipe

OUT, IN = 64, 128


def section_of(name: str, bits: int, group_size: int, sym: bool) -> dict[str, Any]:
    if name == "gptq":
        return autogptq.quantization_config(bits, group_size, sym, 0.05)
    return compressed_tensors.quantization_config(bits, group_size, sym, False)


def random_codes(bits: int, group_size: int, sym: bool) -> UniformCodes:
    generator = torch.Generator().manual_seed(bits + group_size)
    size = IN if group_size == -1 else group_size
    shape, top = (OUT, IN // size), 2**bits
    middle = torch.full(shape, top // 2, dtype=torch.uint8)
    zero = middle if sym else torch.randint(0, top, shape, dtype=torch.uint8, generator=generator)
    codes = torch.randint(0, top, (OUT, IN), dtype=torch.uint8, generator=generator)
    return UniformCodes(codes, torch.rand(shape, generator=generator).half() + 0.01, zero, bits, size)


def words(tensor: torch.Tensor) -> list[int]:
    return [value & 0xFFFFFFFF for value in tensor.flatten().tolist()]


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_round_trip_and_planned_shapes(name: str, bits: int, group_size: int, sym: bool) -> None:
    section = section_of(name, bits, group_size, sym)
    container = container_of(section)
    codes = random_codes(bits, group_size, sym)
    packed = container.pack(codes, section)
    assert {key: (t.dtype, tuple(t.shape)) for key, t in packed.items()} == container.specs(
        OUT, IN, section, torch.float16
    )
    assert all(tensor.is_contiguous() for tensor in packed.values())
    assert container.unpack(packed, section).equals(codes)
    assert container.shape(lambda suffix: tuple(packed[suffix].shape), packed.__getitem__, section) == (OUT, IN)
    assert set(packed) <= set(container.SUFFIXES)
    made = {"bits": bits, "group_size": group_size, "sym": sym}
    assert made.items() <= container.geometry(section).items()


@pytest.mark.parametrize(("bits", "v1", "v2"), [(4, 0x77777777, 0x88888888), (8, 0x7F7F7F7F, 0x80808080)])
def test_symmetric_zero_words(bits: int, v1: int, v2: int) -> None:
    section = section_of("gptq", bits, 32, True)
    assert section["checkpoint_format"] == section["format"] == "gptq"
    codes = random_codes(bits, 32, True)
    assert set(words(autogptq.pack(codes, section)["qzeros"])) == {v1}
    assert set(words(autogptq.pack(codes, section | {"checkpoint_format": "gptq_v2"})["qzeros"])) == {v2}


def test_asymmetric_zeros_go_to_version_2_and_a_borrow_is_undone() -> None:
    section = section_of("gptq", 4, 32, False)
    assert section["checkpoint_format"] == "gptq_v2"
    codes = random_codes(4, 32, False)
    assert (codes.zero == 0).any()
    v1 = section | {"checkpoint_format": "gptq"}
    assert autogptq.unpack(autogptq.pack(codes, v1), v1).equals(codes)
    assert autogptq.unpack(autogptq.pack(codes, section), section).equals(codes)


def test_gptq_packs_sequentially_along_in() -> None:
    codes = random_codes(4, 32, True)
    codes.codes[3, :8] = torch.arange(8, dtype=torch.uint8)
    packed = autogptq.pack(codes, section_of("gptq", 4, 32, True))
    assert packed["qweight"].shape == (IN // 8, OUT)
    assert words(packed["qweight"][0, 3]) == [0x76543210]
    assert packed["g_idx"].tolist() == [i // 32 for i in range(IN)]
    eight = random_codes(8, 32, True)
    eight.codes[3, :4] = torch.tensor([1, 2, 3, 254], dtype=torch.uint8)
    assert words(autogptq.pack(eight, section_of("gptq", 8, 32, True))["qweight"][0, 3]) == [0xFE030201]


def test_compressed_tensors_stores_value_plus_eight_low_bits_first() -> None:
    codes = random_codes(4, 32, True)
    values = torch.arange(-8, 0)
    codes.codes[5, 8:16] = (values + 8).to(torch.uint8)
    packed = compressed_tensors.pack(codes, section_of("compressed-tensors", 4, 32, True))
    assert packed["weight_packed"].shape == (OUT, IN // 8)
    assert words(packed["weight_packed"][5, 1]) == [0x76543210]
    assert packed["weight_shape"].tolist() == [OUT, IN]


def test_v1_word_by_word_as_autogptq_reads_it() -> None:
    """AutoGPTQ's unpacking (qlinear_cuda_old.py): shift, mask, and one more than is stored."""
    codes = random_codes(4, 32, True)
    packed = autogptq.pack(codes, section_of("gptq", 4, 32, True))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    zeros = ((packed["qzeros"].unsqueeze(2) >> shifts) & 15).reshape(IN // 32, OUT) + 1
    values = ((packed["qweight"].unsqueeze(1) >> shifts.view(1, 8, 1)) & 15).reshape(IN, OUT)
    group = packed["g_idx"].long()
    weight = packed["scales"][group].float() * (values - zeros[group])
    assert torch.equal(weight.t(), codes.dequantize())


def test_act_order_of_others_is_read() -> None:
    """Groups of scattered columns, as GPTQModel writes with desc_act, and a last group that is not full."""
    section = section_of("gptq", 4, 32, True)
    codes = random_codes(4, 32, True)
    tensors = autogptq.pack(codes, section)
    tensors["g_idx"] = tensors["g_idx"][torch.randperm(IN, generator=torch.Generator().manual_seed(0))]
    read = autogptq.unpack(tensors, section)
    assert read.g_idx is not None
    column = 17
    group = int(read.g_idx[column])
    expected = (codes.codes[:, column].float() - 8) * codes.scale[:, group].float()
    assert torch.equal(read.dequantize()[:, column], expected)
    assert autogptq.unpack(autogptq.pack(read, section), section).equals(read)
    odd = section | {"group_size": 48}
    tensors = {
        "qweight": packing.pack(codes.codes, 4).t().contiguous(), "scales": codes.scale[:, :3].t().contiguous(),
        "qzeros": torch.full((3, OUT // 8), 0x77777777, dtype=torch.int32),
    }  # fmt: skip
    assert autogptq.unpack(tensors, odd).dequantize().shape == (OUT, IN)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_compressed_tensors_own_code_agrees(bits: int, group_size: int, sym: bool) -> None:
    """Its decompression gives our weights, and its compression of them our bytes."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    section = section_of("compressed-tensors", bits, group_size, sym)
    (scheme,) = QuantizationConfig.model_validate(section).config_groups.values()
    codes = random_codes(bits, group_size, sym)
    codes = UniformCodes(codes.codes, codes.scale.float(), codes.zero, bits, codes.group_size)
    ours = compressed_tensors.pack(codes, section)
    theirs = PackedQuantizationCompressor.decompress(dict(ours), scheme)
    assert torch.equal(theirs["weight"].float(), codes.dequantize())
    loose = {"weight": codes.dequantize(), "weight_scale": codes.scale}
    if not sym:
        loose["weight_zero_point"] = (codes.zero.int() - 2 ** (bits - 1)).to(torch.int8)
    packed = PackedQuantizationCompressor.compress(loose, scheme)
    assert torch.equal(packed["weight_packed"], ours["weight_packed"])
    if not sym:
        assert torch.equal(packed["weight_zero_point"], ours["weight_zero_point"])


def test_a_folder_by_gptqmodel_is_read(tmp_path: Path, tiny: Path) -> None:
    """No manifest, version 2, extra keys in the config: what counts is read."""
    state: dict[str, torch.Tensor] = {}
    for shard in tiny.glob("*.safetensors"):
        state |= load_file(shard)
    linear = "model.layers.0.mlp.up_proj"
    del state[f"{linear}.weight"]
    codes = random_codes(4, 32, True)
    section = section_of("gptq", 4, 32, True) | {"checkpoint_format": "gptq_v2", "desc_act": True, "dynamic": None}
    state |= {f"{linear}.{suffix}": tensor for suffix, tensor in autogptq.pack(codes, section).items()}
    save_file(state, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"quantization_config": section})
    artifact = Artifact.open(tmp_path)
    assert artifact.linears() == [linear]
    assert artifact.codes(linear).equals(codes)
    read = dict(artifact.read())
    assert torch.equal(read[f"{linear}.weight"], codes.dequantize())
    assert f"{linear}.g_idx" not in read


def test_what_is_not_known_is_named(tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match=r"quant_method 'hqq'.*awq, gptq, compressed-tensors, bitsandbytes"):
        container_of({"quant_method": "hqq"})
    section = section_of("gptq", 4, 32, True)
    tensors = autogptq.pack(random_codes(4, 32, True), section)
    with pytest.raises(QtoolError, match="bits is 3"):
        autogptq.unpack(tensors, section | {"bits": 3})
    groups = {"a": {"targets": ["Linear"]}, "b": {"targets": ["re:.*down_proj"]}}
    with pytest.raises(QtoolError, match="targets holds a pattern"):
        compressed_tensors.own({"config_groups": groups}, "model.layers.0.mlp.down_proj")
    with pytest.raises(QtoolError, match="two groups have the target 'Linear'"):
        compressed_tensors.skipped({"config_groups": {"a": groups["a"], "b": groups["a"]}})
    with pytest.raises(QtoolError, match="config_groups holds no group"):
        compressed_tensors.specs(OUT, IN, {"config_groups": {}}, torch.float16)


def test_the_table_names_every_format() -> None:
    assert list(FORMATS) == ["awq", "gptq", "compressed-tensors", "bitsandbytes", "gguf"]
    with pytest.raises(QtoolError, match="qtool reads awq, gptq, compressed-tensors, bitsandbytes"):
        container_of({"quant_method": "gguf"})  # lies in no safetensors


@pytest.mark.parametrize(
    ("method", "name", "engines"),
    [
        ({"method": "awq"}, "awq", ["vllm", "transformers", "sglang"]),
        ({"method": "gptq"}, "gptq", ["vllm", "transformers", "sglang"]),
        ({"method": "gptq", "format": "compressed-tensors"}, "compressed-tensors", ["vllm", "transformers"]),
        ({"method": "nf4"}, "bitsandbytes", ["transformers", "vllm"]),
        ({"method": "gguf"}, "gguf", ["llama.cpp"]),
    ],
)
def test_a_format_says_what_is_stored_in_it_and_what_runs_it(
    method: dict[str, str], name: str, engines: list[str]
) -> None:
    """The section that a manifest's output implies is the one that the method writes; the first engine is planned."""
    output = METHODS[method["method"]].model_validate(method)
    assert format_of(output.model_dump()) is FORMATS[name]
    assert FORMATS[name].section_of(output.model_dump()) == output.container.config_section
    assert [runtime.engine for runtime in runs_in(name)] == engines
    assert runs_in("fp8")[0].engine == "vllm"  # somebody else's


@pytest.mark.parametrize("pack", [lambda t: packing.pack(t, 8), lambda t: packing.pack(t, 4)])
def test_what_does_not_fill_a_word_is_refused(pack: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="do not pack"):
        pack(torch.zeros(2, 6, dtype=torch.uint8))


def test_transformers_loads_compressed_tensors(write_recipe: Callable[..., Path]) -> None:
    """Its own decompression of a whole artifact gives the reference engine's logits, to the last bit."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    output = {"method": "gptq", "format": "compressed-tensors", "group_size": 32, "scaling": "awq"}
    recipe = load_recipe(write_recipe(outputs=[output]))
    job = open_job(recipe, resolve(recipe.model.id), torch.device("cpu"), recipe.outputs)
    tokens = torch.randint(0, 320, (6, 48), generator=torch.Generator().manual_seed(0))
    artifact = make_artifacts(job, CalibrationSet(tokens, "test"))["gptq"]
    theirs = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32).eval()
    ours = load_model(artifact.read(), load_config(artifact.path), torch.device("cpu"))
    with torch.inference_mode():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
