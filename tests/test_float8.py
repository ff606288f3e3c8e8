"""Sources in float8: what is read of them, and that an output of one is an output of what is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import converted
from torch import Tensor

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.small_floats import small_floats_of
from qtool.convert.models.fused import open_model
from qtool.convert.verify.checks import verify
from qtool.sizing.headers import read_headers

BLOCK = (48, 80)  # divides neither side of most matrices
DEEPSEEK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
ONE = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
ROWS = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "kv_cache_scheme": None, "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
}  # fmt: skip
LARGEST = 448.0
SCALE = "model.layers.1.mlp.up_proj.weight_scale_inv"


def stored(weight: Tensor, section: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors of a matrix in float8; what a reader makes of them, a value at a time)."""
    rows, columns = weight.shape
    if section is DEEPSEEK:
        height, width = BLOCK
    else:
        height, width = (rows, columns) if section is ONE else (1, columns)
    scale = torch.zeros(-(-rows // height), -(-columns // width))
    codes, made = torch.zeros(rows, columns).to(torch.float8_e4m3fn), torch.zeros(rows, columns)
    for down in range(scale.shape[0]):
        for right in range(scale.shape[1]):
            part = (slice(down * height, (down + 1) * height), slice(right * width, (right + 1) * width))
            scale[down, right] = weight[part].float().abs().max() / LARGEST
            codes[part] = (weight[part].float() / scale[down, right]).to(torch.float8_e4m3fn)
            made[part] = codes[part].float() * scale[down, right]
    if section is ROWS:
        return {"weight": codes, "weight_scale": scale.to(torch.bfloat16), "input_scale": torch.ones(1)}, (
            codes.float() * scale.to(torch.bfloat16).float()
        ).bfloat16()
    scale = scale.view(()) if section is ONE else scale
    more = {"activation_scale": torch.ones(())} if section is ONE else {}
    return {"weight": codes, "weight_scale_inv": scale} | more, made.bfloat16()


def twins(plain: Path, folder: Path, section: dict[str, Any]) -> tuple[Path, Path]:
    """(a float8 model, the same model as it is read, in bfloat16)."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(plain.glob("*.safetensors")):
        tensors |= load_file(shard)
    small, read = dict(tensors), dict(tensors)
    for name in [name for name in tensors if "proj" in name]:
        module = name.removesuffix(".weight")
        parts, made = stored(small.pop(name), section)
        small |= {f"{module}.{last}": part for last, part in parts.items()}
        read[name] = made
    config = json.loads((plain / "config.json").read_text())
    for path, held, more in ((folder / "float8", small, {"quantization_config": section}), (folder / "read", read, {})):
        path.mkdir(parents=True)
        for file in plain.glob("token*"):
            (path / file.name).write_bytes(file.read_bytes())
        (path / "config.json").write_text(json.dumps(config | more))
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, path / "model.safetensors")
    return folder / "float8", folder / "read"


@pytest.mark.parametrize("section", [DEEPSEEK, ONE, ROWS], ids=["blocks", "one", "rows"])
def test_an_output_is_that_of_what_is_read(section: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    small, read = twins(tiny, tmp_path, section)
    found, expected = open_model(small), open_model(read)
    assert set(found.tensors) == set(expected.tensors)
    for name, tensor in expected.read():
        assert torch.equal(found.tensor(name), tensor), name
        assert torch.equal(found.part(name, 50, 77), tensor[50:77])
    gptq = {"method": "gptq", "group_size": 32, "dtype": "bfloat16", "descent": False}
    outputs = [gptq, {"method": "gguf", "type": "Q8_0", "rounding": "ggml"}]
    places = (tmp_path / "a", tmp_path / "b")
    for place in places:
        place.mkdir()
    ours, theirs = (converted(model, outputs, place) for model, place in zip((small, read), places, strict=True))
    artifact, other = Artifact.open(ours["gptq"]), Artifact.open(theirs["gptq"])
    for name in other.linears():
        assert artifact.codes(name).equals(other.codes(name))
    assert artifact.manifest is not None
    assert artifact.manifest.source["stored_as"] == small_floats_of({"quantization_config": section})
    assert any("errors are against what is read" in note for note in artifact.manifest.notes)
    assert artifact.config["quantization_config"]["quant_method"] == "gptq"
    assert "quantization_config" not in Artifact.open(ours["gguf"]).config
    for path in ours.values():
        assert verify(path, small).sound
    headers = read_headers(str(small))
    assert not headers.quantized


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("no scale", "is stored in 8 bits, and no tensor says its scales"),
        ("other blocks", "have .* scales, or one"),
        ("cache", "kv_cache_scheme is set"),
        ("rotated", "transform_config is set: inputs are rotated"),
        ("not told", "stored as F8_E4M3"),
        ("nan", "up_proj.weight_scale_inv holds NaN, Inf or numbers below 0"),
        ("negative", "up_proj.weight_scale_inv holds NaN, Inf or numbers below 0"),
        ("whole numbers", "stored as torch.int32; scales of float8 are floats"),
        ("two names", "has scales under two names"),
        ("of 16 bits", "scales of a weight stored in 16 bits"),
        ("a norm", "holds model.norm.weight_scale_inv, scales of a weight stored in 16 bits"),
        ("turned", r"have \[6, 2\] scales, or one"),
        ("size", "weight_block_size is 128; two positive whole numbers"),
    ],
)
def test_what_cannot_be_read_is_refused(
    change: str, fault: str, tiny: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    small, _ = twins(tiny, tmp_path, ROWS if change in ("cache", "rotated") else DEEPSEEK)
    path, file = small / "config.json", small / "model.safetensors"
    config, tensors = json.loads(path.read_text()), load_file(file)
    if change == "no scale":
        del tensors[SCALE]
    elif change == "other blocks":
        config["quantization_config"]["weight_block_size"] = [16, 16]
    elif change == "cache":
        config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8}
    elif change == "rotated":
        config["quantization_config"]["transform_config"] = {"config_groups": {"u": {"type": "hadamard"}}}
    elif change in ("nan", "negative"):
        tensors[SCALE][1, 1] = torch.nan if change == "nan" else -1.0
    elif change == "whole numbers":
        tensors[SCALE] = tensors[SCALE].to(torch.int32)
    elif change == "two names":
        tensors[SCALE.removesuffix("_inv")] = torch.ones(1)
    elif change == "of 16 bits":
        tensors[SCALE.removesuffix("_scale_inv")] = torch.ones(256, 128, dtype=torch.bfloat16)
    elif change == "a norm":
        tensors["model.norm.weight_scale_inv"] = torch.ones(1)
    elif change == "turned":
        tensors[SCALE] = tensors[SCALE].t().contiguous()
    elif change == "size":
        config["quantization_config"]["weight_block_size"] = 128
    else:
        del config["quantization_config"]
        tensors = {name: tensor for name, tensor in tensors.items() if "scale" not in name}
    path.write_text(json.dumps(config))
    save_file(tensors, file)
    with pytest.raises(QtoolError, match=fault):
        converted(small, [{"method": "gptq", "group_size": 32}], tmp_path)
