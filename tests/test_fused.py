"""Sources whose experts lie in one tensor for all, as in transformers' memory or transposed: read expert by expert."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_files import fused_copy, fused_tensors
from moe_models import MIXTURES
from safetensors.torch import load_file
from small_models import converted

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.models.fused import open_model
from qtool.convert.skeleton import load_config
from qtool.convert.verify.checks import verify
from qtool.evaluate.engines.torch_model import load_model
from qtool.sizing.formats import weights_of
from qtool.sizing.headers import read_headers

AWQ: dict[str, Any] = {"method": "awq", "group_size": 32}
OUTPUTS: list[dict[str, Any]] = [AWQ, {"method": "gptq", "group_size": 32}, {"method": "gguf", "type": "F16"}]
# no layer without experts, which llama.cpp refuses
CHANGES = {name: settings | {"mlp_only_layers": []} for name, settings in MIXTURES.items()}


@pytest.fixture(scope="module", params=["Qwen3Moe", "Mixtral"])
def layouts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model: each expert alone, as transformers writes it fused, and transposed."""
    from small_models import make_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp(request.param)
    alone = make_model(folder / "alone" / "model", request.param, **CHANGES[request.param])
    fused = fused_copy(alone, folder / "fused" / "model")
    loaded = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.bfloat16)
    loaded.save_pretrained(folder / "saved", save_original_format=False)
    saved = load_file(folder / "saved" / "model.safetensors")
    own = load_file(fused / "model.safetensors")
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], own[name]) for name in own)
    return {"alone": alone, "fused": fused, "transposed": fused_copy(alone, folder / "turned" / "model", True)}


@pytest.mark.slow
def test_one_model_has_the_same_artifacts_in_every_layout(layouts: dict[str, Path]) -> None:
    """Weights, fold scales and figures byte for byte; each verifies against a source of any layout."""
    made = {name: converted(model, OUTPUTS, model.parent) for name, model in layouts.items()}
    for name, paths in made.items():
        for output, path in paths.items():
            alone = made["alone"][output]
            files = [file.relative_to(path) for file in path.rglob("*") if file.suffix in (".safetensors", ".gguf")]
            assert files
            for file in files:
                assert (path / file).read_bytes() == (alone / file).read_bytes(), (name, output, file)
            ours, theirs = Artifact.open(path).manifest, Artifact.open(alone).manifest
            assert ours is not None
            assert theirs is not None
            assert ours.ledger == theirs.ledger
            result = verify(path, layouts["fused" if name == "alone" else "alone"])
            assert result.sound, [check for check in result.checks if check.status == "fail"]


def test_every_reader_takes_every_layout(layouts: dict[str, Path]) -> None:
    """The plan's sizes, the reference engine, a folder opened like an artifact."""
    ids = torch.randint(0, 320, (1, 16), generator=torch.Generator().manual_seed(2))
    alone = dict(Checkpoint.open(layouts["alone"]).read())
    config = load_config(layouts["alone"])
    expected = load_model(iter(alone.items()), config, torch.device("cpu"))(ids).logits
    planned = weights_of(read_headers(str(layouts["alone"])), "awq-g32")
    for model in layouts.values():
        held = dict(open_model(model).read())
        assert held.keys() == alone.keys()
        assert all(torch.equal(held[name], tensor) for name, tensor in alone.items())
        assert torch.equal(load_model(Artifact.open(model).read(), config, torch.device("cpu"))(ids).logits, expected)
        assert weights_of(read_headers(str(model)), "awq-g32") == planned


def test_a_part_of_an_expert_is_read_by_rows(layouts: dict[str, Path]) -> None:
    """Of up and of down, from either layout, without the rest of the tensor (whose file says so: it is cut off)."""
    alone = Checkpoint.open(layouts["alone"])
    names = [name for name in alone.tensors if re.search(r"experts\.2\.(up_proj|down_proj|w3|w2)\.weight", name)]
    assert len(names) >= 4
    for layout in ("fused", "transposed"):
        checkpoint = open_model(layouts[layout])
        for name in names:
            assert torch.equal(checkpoint.part(name, 3, 17), alone.tensor(name)[3:17])
            assert checkpoint.tensor(name).is_contiguous()
            assert checkpoint.tensor(name).untyped_storage().nbytes() == checkpoint.tensors[name].nbytes


@pytest.mark.parametrize("changed", ["gate_up_proj", "down_proj"])
def test_a_fused_tensor_of_another_shape_is_named(
    changed: str, model_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """With the shapes of both layouts, before anything is written; so is one that lies the other way round."""
    model = model_maker(tmp_path / "model", "Qwen3Moe", **MIXTURES["Qwen3Moe"])
    name = f"model.layers.2.mlp.experts.{changed}"
    tensors = fused_tensors(model, transposed=False)
    short = fused_copy(model, tmp_path / "short" / "model", tensors={**tensors, name: tensors[name][:5].contiguous()})
    said = {
        "gate_up_proj": r"\[5, 128, 128\], but config\.json implies \[6, 128, 128\], or \[6, 128, 128\] where",
        "down_proj": r"\[5, 128, 64\], but config\.json implies \[6, 128, 64\], or \[6, 64, 128\] where",
    }[changed]
    with pytest.raises(QtoolError, match=rf"{re.escape(name)} has shape {said} experts are transposed"):
        converted(short, [AWQ], tmp_path / "short")
    with pytest.raises(QtoolError, match=re.escape(name)):
        read_headers(str(short))
    flat = fused_copy(model, tmp_path / "flat", tensors={**tensors, name: tensors[name].flatten(0, 1)})
    with pytest.raises(QtoolError, match=rf"{re.escape(name)} has shape \[768, (128|64)\], but"):
        open_model(flat)


def test_layouts_that_do_not_agree_are_named(model_maker: Callable[..., Path], tmp_path: Path) -> None:
    changes = MIXTURES["Qwen3Moe"] | {"moe_intermediate_size": 48, "mlp_only_layers": []}
    model = model_maker(tmp_path / "model", "Qwen3Moe", **changes)
    plain, turned = (fused_tensors(model, transposed=one) for one in (False, True))
    down = "model.layers.1.mlp.experts.down_proj"
    mixed = fused_copy(model, tmp_path / "mixed", tensors={**plain, down: turned[down]})
    with pytest.raises(QtoolError, match=r"gate_up_proj \[6, 96, 128\] and .*down_proj \[6, 48, 128\]: one of them is"):
        open_model(mixed)
    twice = dict(Checkpoint.open(model).read()) | plain
    both = fused_copy(model, tmp_path / "both", tensors=twice)
    with pytest.raises(QtoolError, match=r"experts\.0\.gate_proj\.weight, which .* holds as a part of all experts'"):
        open_model(both)
    del plain[down]
    lost = fused_copy(model, tmp_path / "lost" / "model", tensors=plain)
    with pytest.raises(QtoolError, match=r"implies a tensor model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight"):
        converted(lost, [AWQ], tmp_path / "lost")
