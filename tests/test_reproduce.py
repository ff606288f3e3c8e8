"""`qtool reproduce`: the same bits again, or what differs and why."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from qtool import QtoolError
from qtool.cli import main
from qtool.recipe.redaction import without_folders


def reproduce(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["reproduce", str(folder), "--device", "cpu", *words])


@pytest.fixture
def folder(finished: Any, tmp_path: Path) -> Path:
    (path,) = finished.folder.parents[1].glob("artifacts/*-awq")
    return Path(shutil.copytree(path, tmp_path / "awq"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["awq", "nf4"])
def test_the_same_bits_again(finished: Any, name: str) -> None:
    (path,) = finished.folder.parents[1].glob(f"artifacts/*-{name}")
    result = reproduce(path)
    assert result.exit_code == 0, result.output
    assert "tensors, the same bit for bit" in result.output


def test_a_gguf_file_without_holding_two_models(
    write_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtool.run import run
    from qtool.share import reproduce as module

    run(write_recipe(outputs=[{"method": "gguf", "type": "Q8_0"}]), tmp_path / "runs", "cpu")
    (path,) = (tmp_path / "artifacts").iterdir()
    seen: list[weakref.ref[torch.Tensor]] = []
    compare = module._difference

    def watched(before: torch.Tensor | None, after: torch.Tensor | None) -> str:
        assert not [tensor for tensor in seen if tensor() is not None]
        seen.extend(weakref.ref(tensor) for tensor in (before, after) if tensor is not None)
        return compare(before, after)

    monkeypatch.setattr(module, "_difference", watched)
    result = reproduce(path)
    assert result.exit_code == 0, result.output
    assert "tensors, the same bit for bit" in result.output
    assert len(seen) == 2 * 20
    (file,) = path.glob("*.gguf")
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    result = reproduce(path)
    assert result.exit_code == 1
    assert "1 of " in result.output


def test_a_published_one_whose_manifest_names_no_folders(folder: Path, finished: Any, tiny: Path) -> None:
    manifest = without_folders(json.loads((folder / "qtool.json").read_text()))
    (folder / "qtool.json").write_text(json.dumps(manifest))
    lost = reproduce(folder)
    assert lost.exit_code == 2
    assert "model: no folder 'tiny'" in lost.output
    text = finished.folder.parents[1] / "text.txt"
    result = reproduce(folder, "--source", str(tiny), "--text", str(text))
    assert result.exit_code == 0, result.output


def test_one_changed_number_is_named_with_what_may_be_why(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("up_proj.scales"))
    tensors[name].view(torch.int16)[0, 0] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    manifest = json.loads((folder / "qtool.json").read_text())
    manifest["device"] = "NVIDIA H100"
    manifest["versions"]["torch"] = "1.0"
    (folder / "qtool.json").write_text(json.dumps(manifest))
    result = reproduce(folder)
    assert result.exit_code == 1, result.output
    assert f"{name}: 1 of " in result.output
    assert "1 of " in result.output
    assert "why it may: made on NVIDIA H100, built again on cpu" in result.output
    assert "why it may: torch 1.0 then, " in result.output


def test_another_source(folder: Path, model_maker: Any, tmp_path: Path) -> None:
    other = model_maker(tmp_path / "other", rms_norm_eps=1e-3)
    result = reproduce(folder, "--source", str(other))
    assert result.exit_code == 2
    assert "not the same source. Name the right one with --source" in result.output


def test_another_calibration_text(folder: Path, text_file: Path) -> None:
    text_file.write_text("# other\n" * 2000)
    result = reproduce(folder, "--text", str(text_file))
    assert result.exit_code == 2
    assert "not the calibration text that was used. Name it with --text" in result.output


def test_a_folder_of_another_tool(tiny: Path) -> None:
    result = reproduce(tiny)
    assert result.exit_code == 2
    assert "only artifacts written by qtool say how they were made" in result.output


def test_what_is_no_folder_and_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtool.share.reproduce import published

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/a-awq").mkdir(parents=True)
    assert published("my-org/a-awq")
    assert not published("mine/a-awq")
    for name, said in (
        ("mine/b-awq", "no such folder. mine has a-awq"), ("artifacts/none", "no such folder"), ("./a/b", "no such"),
        ("nonsense", "no such folder"), ("a/b/c", "no such folder"), ("~nouser_x/a", "no such user"),
    ):  # fmt: skip
        with pytest.raises(QtoolError, match=said) as error:
            published(name)
        assert error.value.exit_code == 2
