"""Sources in MXFP4, gpt-oss's spelling and compressed-tensors': what is read of them, and what an output of one is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_files import fused_tensors
from moe_models import MIXTURES
from safetensors.torch import load_file, save_file
from small_models import converted, make_model
from torch import Tensor

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.tensor_info import Mxfp4, TensorInfo
from qtool.convert.models.fused import open_model
from qtool.convert.verify.checks import verify
from qtool.sizing.headers import read_headers

COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "kv_cache_scheme": None,
    "ignore": ["lm_head"], "quantization_status": "compressed",
    "config_groups": {"group_0": {
        "targets": ["Linear"], "format": "mxfp4-pack-quantized",
        "weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
                    "dynamic": False, "scale_dtype": "torch.uint8"},
    }},
}  # fmt: skip
BLOCKS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
OUTPUTS: list[dict[str, Any]] = [
    {"method": "awq", "group_size": 32, "dtype": "bfloat16", "descent": False},
    {"method": "gguf", "type": "Q8_0", "rounding": "ggml"},
]


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    info = TensorInfo(Path(), torch.uint8, ())
    return Mxfp4(info, info).decode(codes, scales, 0, torch.bfloat16)


def test_every_code_is_what_transformers_and_compressed_tensors_read() -> None:
    """All pairs of codes with every exponent, bit for bit; 255 is no number and refused."""
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import MXFP4A16
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes = torch.arange(256, dtype=torch.uint8).repeat(255, 1)
    scales = torch.arange(255, dtype=torch.uint8).view(-1, 1).repeat(1, 16)
    found = decode(codes, scales)
    theirs = convert_moe_packed_tensors(codes.view(1, 255, 16, 16), scales.view(1, 255, 16)).mT[0]
    assert torch.equal(found.view(torch.int16), theirs.contiguous().view(torch.int16))
    scheme = QuantizationScheme(targets=["Linear"], **MXFP4A16)
    state = MXFP4PackedCompressor.decompress({"weight_packed": codes, "weight_scale": scales}, scheme)
    assert torch.equal(found[1:254], state["weight"][1:254])  # its powers of the last exponents are of bfloat16's pow
    assert found[127, :6].tolist() == [0.0, 0.0, 0.5, 0.0, 1.0, 0.0]  # the low half first: 0x00, 0x01, 0x02
    with pytest.raises(QtoolError, match="holds 255, which is no scale"):
        decode(codes[:1], torch.full((1, 16), 255, dtype=torch.uint8))


def rounded(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, what is read) of a matrix, by compressed-tensors' own code."""
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import MXFP4A16

    scheme = QuantizationScheme(targets=["Linear"], **MXFP4A16)
    largest = weight.float().view(weight.shape[0], -1, 32).abs().amax(-1)
    scale = torch.exp2(torch.floor(torch.log2(largest / 6)) + 1)
    packed = MXFP4PackedCompressor.compress({"weight": weight.float(), "weight_scale": scale}, scheme)
    made = MXFP4PackedCompressor.decompress(packed, scheme)["weight"]
    return packed["weight_packed"], packed["weight_scale"], made.bfloat16()


def twins(tensors: dict[str, Tensor], plain: Path, folder: Path, section: dict[str, Any]) -> tuple[Path, Path]:
    """(a model in MXFP4, the same model as it is read, in bfloat16)."""
    small, read = dict(tensors), dict(tensors)
    for name in tensors:
        if section is COMPRESSED and "proj" in name:
            codes, scales, read[name] = rounded(small.pop(name))
            stem = name.removesuffix(".weight")
            small |= {f"{stem}.weight_packed": codes, f"{stem}.weight_scale": scales}
        elif section is BLOCKS and ".experts." in name:
            held = [rounded(expert) for expert in small.pop(name)]
            codes, scales, read[name] = (torch.stack(part) for part in zip(*held, strict=True))
            small |= {f"{name}_blocks": codes.view(*scales.shape, 16), f"{name}_scales": scales}
    config = json.loads((plain / "config.json").read_text())
    for path, held, more in ((folder / "mxfp4", small, {"quantization_config": section}), (folder / "read", read, {})):
        path.mkdir(parents=True)
        for file in plain.glob("token*"):
            (path / file.name).write_bytes(file.read_bytes())
        (path / "config.json").write_text(json.dumps(config | more))
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, path / "model.safetensors")
    return folder / "mxfp4", folder / "read"


@pytest.fixture(params=["compressed-tensors", "blocks"])
def pair(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    if request.param == "compressed-tensors":
        tensors = {name: t for shard in tiny.glob("*.safetensors") for name, t in load_file(shard).items()}
        return twins(tensors, tiny, tmp_path, COMPRESSED)
    plain = make_model(tmp_path / "plain", "Qwen3Moe", **MIXTURES["Qwen3Moe"] | {"mlp_only_layers": []})
    return twins(fused_tensors(plain, False), plain, tmp_path, BLOCKS)


def test_an_output_is_that_of_what_is_read(pair: tuple[Path, Path], tmp_path: Path) -> None:
    small, read = pair
    found, expected = open_model(small), open_model(read)
    assert set(found.tensors) == set(expected.tensors)
    for name, tensor in expected.read():
        assert torch.equal(found.tensor(name), tensor), name
        assert torch.equal(found.part(name, 1, 5), tensor[1:5]), name
        assert found.tensors[name].nbytes == expected.tensors[name].nbytes
    places = (tmp_path / "a", tmp_path / "b")
    for place in places:
        place.mkdir()
    ours, theirs = (converted(model, OUTPUTS, place) for model, place in zip((small, read), places, strict=True))
    artifact, other = Artifact.open(ours["awq"]), Artifact.open(theirs["awq"])
    for name in other.linears():
        assert artifact.codes(name).equals(other.codes(name))
    assert artifact.manifest is not None
    assert other.manifest is not None
    assert artifact.manifest.ledger == other.manifest.ledger  # what MXFP4 lost is not charged
    assert "mxfp4" in artifact.manifest.source["stored_as"]
    assert any("errors are against what is read" in note for note in artifact.manifest.notes)
    assert artifact.config["quantization_config"]["quant_method"] == "awq"
    assert (ours["gguf"] / "model.gguf").exists() or list(ours["gguf"].glob("*.gguf"))
    for path in ours.values():
        assert verify(path, small).sound
    assert not read_headers(str(small)).quantized


PACKED, SCALE = "model.layers.1.mlp.up_proj.weight_packed", "model.layers.1.mlp.up_proj.weight_scale"


def no_scale(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors[SCALE]


def wide_scale(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[SCALE] = tensors[SCALE].repeat(1, 2)


def float_scale(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[SCALE] = tensors[SCALE].to(torch.float32)


def twice(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(256, 128, dtype=torch.bfloat16)


def skewed(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False


def rotated(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["quantization_config"]["transform_config"] = {"config_groups": {"u": {"type": "hadamard", "apply": []}}}


def not_a_number(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[SCALE][3, 1] = 255


def untold(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del config["quantization_config"]


def other_bytes(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[PACKED.replace("weight_packed", "weight_zero_point")] = tensors[SCALE].clone()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (no_scale, "up_proj.weight_scale says its scales"),
        (wide_scale, r"up_proj.weight_scale is \[256, 8\] .* wants \[256, 4\]"),
        (float_scale, "is .* in torch.float32; .* in torch.uint8"),
        (twice, "up_proj.weight is stored too"),
        (skewed, "which is symmetric"),
        (rotated, "transform_config is set: inputs are rotated"),
        (not_a_number, "up_proj.weight_scale holds 255"),
        (untold, "quantized already|stored as U8"),
        (other_bytes, "does not say what they are"),
    ],
)
def test_what_cannot_be_read_is_refused(
    change: Callable[[dict[str, Any], dict[str, Tensor]], None], fault: str, tiny: Path, tmp_path: Path
) -> None:
    tensors = {name: t for shard in tiny.glob("*.safetensors") for name, t in load_file(shard).items()}
    small, _ = twins(tensors, tiny, tmp_path, COMPRESSED)
    config, held = json.loads((small / "config.json").read_text()), load_file(small / "model.safetensors")
    change(config, held)
    (small / "config.json").write_text(json.dumps(config))
    save_file(held, small / "model.safetensors")
    for output in ({"method": "awq", "group_size": 32, "rounding": "rtn"}, {"method": "gguf", "type": "Q8_0"}):
        with pytest.raises(QtoolError, match=fault):
            converted(small, [output], tmp_path)
