"""Source folders: good ones, and each bad one with the message its user gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.reading import read_json
from qtool.convert.files.shard_header import INDEX, read_places
from qtool.convert.files.source import resolve
from qtool.convert.skeleton import _fill_buffers, build_skeleton, expected_shapes, load_config


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def check(folder: Path) -> None:
    shapes, tied = expected_shapes(build_skeleton(load_config(folder)))
    Checkpoint.open(folder).check_shapes(shapes, tied)


def test_a_sharded_folder_reads_like_transformers(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert len(list(tiny.glob("*.safetensors"))) > 1
    check(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    state = model.state_dict()
    read = dict(Checkpoint.open(tiny).read())
    assert set(state) - set(read) == {"lm_head.weight"}  # tied
    assert all(torch.equal(tensor, state[name]) for name, tensor in read.items())


def test_a_program_that_ends_with_an_open_shard_says_nothing(tiny: Path) -> None:
    """The interpreter takes modules apart before it drops what is in a cycle or held by a builtin."""
    program = (
        "import builtins, sys; from pathlib import Path; from qtool.convert.files.checkpoint import Checkpoint\n"
        "found = Checkpoint.open(Path(sys.argv[1])); found.tensor(next(iter(found.tensors))); builtins.kept = found"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program, str(tiny)], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_skeleton_takes_no_memory_and_has_real_rotary_tables(tiny: Path) -> None:
    model = build_skeleton(load_config(tiny))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_pickle_only_is_refused_with_the_command_that_converts(copy: Path) -> None:
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(QtoolError, match=r"pytorch_model.bin.*can run code.*save_pretrained"):
        Checkpoint.open(copy)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match=r"no \*\.safetensors"):
        Checkpoint.open(tmp_path)
    with pytest.raises(QtoolError, match="no such folder"):
        Checkpoint.open(tmp_path / "absent")


def test_truncated_shard_is_named(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(QtoolError, match=shard.name):
        Checkpoint.open(copy)


def test_hostile_header_is_refused(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    with pytest.raises(QtoolError, match=shard.name):
        Checkpoint.open(copy)


def test_missing_shard_is_named(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(QtoolError, match=f"{shard.name}: the shard is missing"):
        Checkpoint.open(copy)


def test_index_that_promises_too_much(copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["model.layers.0.ghost.weight"] = sorted(copy.glob("*.safetensors"))[0].name
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(QtoolError, match="ghost"):
        Checkpoint.open(copy)


def test_json_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    with pytest.raises(QtoolError, match=r"deep\.json: not valid JSON"):
        read_json(tmp_path / "deep.json")
    with pytest.raises(QtoolError, match="is a folder, not a file"):
        read_json(tmp_path)


@pytest.mark.parametrize("shard", ["../tiny/model.safetensors", "/etc/model.safetensors", "..", "", 7])
def test_an_index_that_leads_out_of_the_folder(copy: Path, shard: object) -> None:
    (copy / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(QtoolError, match=r"model\.norm\.weight is in .*, which is no file of this folder"):
        Checkpoint.open(copy)
    (copy / INDEX).write_text(json.dumps({"weight_map": ["model.norm.weight"]}))
    with pytest.raises(QtoolError, match="has no weight_map"):
        Checkpoint.open(copy)


def test_a_tensor_in_two_shards_is_the_indexs_or_nobodys(copy: Path) -> None:
    first, second = sorted(copy.glob("*.safetensors"))[:2]
    norm = torch.full((128,), 7.0, dtype=torch.bfloat16)
    name, index = "model.norm.weight", json.loads((copy / INDEX).read_text())
    save_file({name: norm} | load_file(first), first)
    save_file({name: norm + 1} | load_file(second), second)
    for shard, value in ((first, 7), (second, 8)):
        index["weight_map"][name] = shard.name
        (copy / INDEX).write_text(json.dumps(index))
        assert Checkpoint.open(copy).tensor(name)[0] == value
    (copy / INDEX).unlink()
    with pytest.raises(QtoolError, match=rf"{second.name}: holds {name} \(1 such\), which {first.name} holds too"):
        Checkpoint.open(copy)


def test_what_transformers_does_not_load_is_not_read(copy: Path) -> None:
    shards = {shard: load_file(shard) for shard in copy.glob("*.safetensors")}
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}, copy / "model.safetensors")
    assert set(Checkpoint.open(copy).tensors) == set(tensors)  # neither the stale index's shards nor the rotary table


def test_shape_that_contradicts_the_config_names_file_and_tensor(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["intermediate_size"] = 512
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match=r"model-0000.*(gate|up|down)_proj.*\[.*256.*\].*config.json implies.*512"):
        check(copy)


def test_missing_tensor_is_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match=r"model\.layers\.2"):
        check(copy)


def test_quantized_source_is_refused(tmp_path: Path) -> None:
    """Float8 where config.json says how it is scaled is read; where it does not, no tensor tells what it means."""
    save_file({"model.layers.0.w": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(QtoolError, match=r"model\.layers\.0\.w.*F8_E4M3.*unquantized"):
        Checkpoint.open(tmp_path).check_dtypes()
    save_file({"model.layers.0.w": torch.zeros(2, 2).to(torch.float8_e5m2)}, tmp_path / "model.safetensors")
    with pytest.raises(QtoolError, match=r"model\.layers\.0\.w.*F8_E5M2.*unquantized"):
        Checkpoint.open(tmp_path)


def test_local_folders_are_named_by_their_content(tiny: Path, copy: Path) -> None:
    assert resolve(str(tiny)).commit == resolve(str(copy)).commit
    shard = sorted(copy.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert resolve(str(tiny)).commit != resolve(str(copy)).commit


@pytest.mark.parametrize("name", ["merges.txt", "qwen.tiktoken", "chat_template.jinja"])
def test_other_tokens_are_another_source(copy: Path, name: str) -> None:
    (copy / name).write_text("a b\n")
    before = resolve(str(copy)).commit
    (copy / name).write_text("b a\n")
    assert resolve(str(copy)).commit != before
    (copy / "notes.json").mkdir()  # a folder with such a name is no file to read
    resolve(str(copy))


def test_a_hub_id_that_the_hub_forbids() -> None:
    with pytest.raises(QtoolError, match=r"a--b/c\.\.d: is no id that the Hub allows"):
        resolve("a--b/c..d")


def test_a_gated_model_says_what_to_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    def gated(*_: object, **__: object) -> None:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(QtoolError, match="org/name: is gated: accept its terms"):
        resolve("org/name")


def test_a_folder_that_is_not_there_is_not_looked_up_on_the_hub() -> None:
    for name in ("./nowhere", "/nowhere/at/all", "nowhere"):
        with pytest.raises(QtoolError, match="no folder"):
            resolve(name)


def test_hub_without_network_says_how_to_go_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(QtoolError, match="hf download") as error:
        resolve("some-org/some-model", "main")
    assert error.value.exit_code == 3


def test_a_buffer_that_no_config_tells_is_named() -> None:
    module = torch.nn.Linear(2, 2, device="meta")
    module.register_buffer("table", torch.empty(3, device="meta"))
    with pytest.raises(QtoolError, match=r"Linear \(proj\) holds buffers that cannot be made from config\.json alone"):
        _fill_buffers("proj", module, torch.nn.Sequential(module))


def test_a_shard_that_shrinks_while_it_is_open(tiny: Path, tmp_path: Path) -> None:
    """Read, not mapped: a mapped file that becomes shorter ends the process with SIGBUS."""
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    checkpoint = Checkpoint.open(folder)
    by_shard: dict[Path, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        by_shard.setdefault(info.file, []).append(name)
    shard, names = next((shard, names) for shard, names in by_shard.items() if len(names) > 1)
    assert checkpoint.tensor(names[0]).isfinite().all()
    places = read_places(shard)
    last = max(names, key=places.__getitem__)
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(QtoolError, match=rf"{shard}: became shorter or another file while it was read: {last}"):
        checkpoint.tensor(last)
    os.truncate(shard, 4)
    with pytest.raises(QtoolError, match="became shorter or another file"):
        Checkpoint(folder, checkpoint.tensors).tensor(names[0])


def test_rows_of_a_tensor(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        whole = checkpoint.tensor(name)
        assert torch.equal(checkpoint.part(name, 3, 7), whole[3:7])
        assert torch.equal(checkpoint.part(name, len(whole) - 2, len(whole) + 5), whole[-2:])
    stored = {k: v for shard in tiny.glob("*.safetensors") for k, v in load_file(shard).items()}
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in stored.items())
