"""Artifacts made to deceive: every file's sha256 is renewed and the manifest says what its maker likes. `verify` fails
each by name."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import converted
from test_verify import EMBEDDING, OUTPUTS, Q, change_tensor, edit_config, edit_manifest, failures, rename, sign

from qtool import QtoolError
from qtool.convert.files.manifest import MANIFEST, read_manifest
from qtool.convert.files.reading import strict_json
from qtool.convert.formats.bnb_nf4 import KEYS as NF4_KEYS
from qtool.convert.formats.bnb_nf4 import MARK, NF4
from qtool.convert.formats.table import container_of
from qtool.convert.verify.checks import verify
from qtool.convert.verify.files import check_files

WITH_GGUF = [*OUTPUTS, {"method": "gguf", "name": "q8", "type": "Q8_0"}]
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return converted(tiny, WITH_GGUF, tmp_path_factory.mktemp("fooled"))


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(made[name], tmp_path / name))


def edit_json(folder: Path, file: str = "config.json", **changes: Any) -> None:
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(data | changes))
    sign(folder)


def zero_codes(folder: Path, linear: str) -> None:
    """Every code is its zero point: AWQ and GPTQ v2 store zeros as they are."""
    tensors = load_file(folder / "model.safetensors")
    name = f"{linear}.qweight"
    tensors[name] = torch.zeros_like(tensors[name])
    tensors[f"{linear}.qzeros"] = torch.zeros_like(tensors[f"{linear}.qzeros"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sign(folder)


def middle(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


def add(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {name: tensor}, folder / "model.safetensors", metadata={"format": "pt"})
        sign(folder)

    return plant


def state(text: str) -> Callable[[Path], None]:
    data = torch.tensor(list(text.ljust(175).encode()), dtype=torch.uint8)
    return lambda folder: change_tensor(folder, f"{Q}.{MARK}", lambda _: data)


def unquantized(folder: Path) -> None:
    """One linear as it was: the manifest speaks of the rest."""
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{Q}.")}
    kept[f"{Q}.weight"] = torch.randn(256, 128).half()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    ledger = json.loads((folder / MANIFEST).read_text())["ledger"]
    del ledger[Q]
    edit_manifest(folder, ledger=ledger)
    sign(folder)


H = torch.float16
FOOLED: list[tuple[str, Callable[[Path], Any], str]] = [
    ("awq", lambda p: zero_codes(p, Q), f"{Q} is all zero"),
    ("v2", lambda p: zero_codes(p, Q), f"{Q} is all zero"),
    ("gptq", lambda p: change_tensor(p, f"{Q}.qweight", middle(-0x77777778)), f"{Q} is all zero"),
    ("ct", lambda p: change_tensor(p, f"{Q}.weight_packed", middle(-0x77777778)), f"{Q} is all zero"),
    ("nf4", lambda p: change_tensor(p, f"{Q}.weight", middle(0x77)), f"{Q} is all zero"),
    ("gptq", lambda p: change_tensor(p, f"{Q}.scales", middle(60000)), "float16 ends at 65504"),
    ("nf4", lambda p: change_tensor(p, f"{Q}.weight.quant_map", lambda t: t * 0), "NF4's 16 values"),
    ("nf4", lambda p: change_tensor(p, f"{Q}.weight.quant_map", lambda t: t.flip(0)), "NF4's 16 values"),
    ("nf4", state('{"quant_type":"nf4","blocksize":-1,"dtype":"bfloat16","shape":[256,128]}'), "is not the JSON"),
    ("nf4", state('{"blocksize":64,"dtype":"bfloat16","shape":[1e999,128]}'), "is not the JSON"),
    ("nf4", state('{"blocksize":64,"dtype":"os.system","shape":[256,128]}'), "dtype 'os.system' is unknown"),
    ("nf4", state('{"blocksize":64,"blocksize":32,"dtype":"bfloat16","shape":[256,128]}'), "is not the JSON"),
    ("nf4", state("[" * 9000), "is not the JSON"),
    ("awq", lambda p: change_tensor(p, EMBEDDING, lambda t: t * 0), f"{EMBEDDING} is all zero"),
    ("awq", lambda p: change_tensor(p, NORM, lambda t: t * 0), f"{NORM} is all zero"),
    ("awq", lambda p: change_tensor(p, NORM, lambda t: t.float()), f"{NORM} is torch.float32, expected torch.float16"),
    ("nf4", lambda p: change_tensor(p, NORM, lambda t: t.int()), f"{NORM} is torch.int32, which is no model's weight"),
    ("awq", lambda p: change_tensor(p, NORM, lambda t: t[:64]), f"{NORM} is [64], config.json implies [128]"),
    ("awq", lambda p: rename(p, NORM, None), f"{NORM} is missing, which config.json implies"),
    ("awq", add("v_head.summary.weight", torch.ones(1, 128, dtype=H)), "v_head.summary.weight is in the file"),
    ("gptq", add("model.layers.2.mlp.up_proj.weight", torch.ones(2, 128, dtype=H)), "num_hidden_layers 2, the weights"),
    ("ct", add(f"{Q}.bias", torch.ones(256, dtype=H)), f"{Q}.bias is in the file"),
    ("nf4", add(f"{Q}.lora_A.weight", torch.ones(4, 128)), f"{Q}.lora_A.weight is in the file"),
    ("awq", add("lm_head.weight", torch.ones(320, 128, dtype=H).tril()), "lm_head.weight is unlike model.embed_tokens"),
    ("awq", unquantized, f"{Q}.weight stay in 16 bits"),
    ("awq", lambda p: edit_json(p, num_hidden_layers=3), "says num_hidden_layers 3, the weights have 2"),
    ("awq", lambda p: edit_json(p, intermediate_size=512), "is [128, 256], config.json implies [128, 512]"),
    ("awq", lambda p: edit_json(p, num_key_value_heads=4), "config.json implies [128, 128]"),
    ("awq", lambda p: edit_json(p, tie_word_embeddings=False), "lm_head.weight is missing"),
    ("awq", lambda p: edit_json(p, attention_bias=True), "q_proj.bias is missing, which config.json implies"),
    ("awq", lambda p: edit_config(p, modules_to_not_convert=["up_proj"]), "leaves model.layers.0.mlp.up_proj unquant"),
    ("ct", lambda p: edit_config(p, ignore=["lm_head", "re:.*"]), "leaves model.layers.0"),
    ("nf4", lambda p: edit_config(p, llm_int8_skip_modules=["lm_head", "layers"]), "leaves model.layers.0"),
    ("gptq", lambda p: edit_config(p, dynamic={"-:.*": {}}), "leaves model.layers.0.mlp.down_proj unquantized"),
    ("ct", lambda p: edit_config(p, kv_cache_scheme={"num_bits": 8}), "quantizes activations or the cache too"),
    ("gptq", lambda p: change_tensor(p, f"{Q}.g_idx", lambda t: t.flip(0)), "g_idx is out of order, and desc_act is"),
    ("awq", lambda p: edit_manifest(p, ledger={}), "the ledger does not name model.layers.0."),
    ("awq", lambda p: edit_manifest(p, tensor_bytes=1), "the manifest says tensor_bytes 1, the tensors have"),
    ("awq", lambda p: edit_manifest(p, bits_per_weight=0.5), "the manifest says bits_per_weight 0.5"),
    ("q8", lambda p: edit_json(p, num_hidden_layers=1), "model.layers.1.mlp.down_proj.weight is missing"),
    ("q8", lambda p: edit_json(p, intermediate_size=512), "llama.feed_forward_length is 256, config.json says 512"),
    ("q8", lambda p: edit_manifest(p, ledger={}), "the ledger does not name model.layers.0."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "plant", "said"), FOOLED, ids=[f"{name}: {said}" for name, _, said in FOOLED])
def test_it_is_not_fooled(name: str, plant: Callable[[Path], Any], said: str, copy: Callable[[str], Path]) -> None:
    folder = copy(name)
    plant(folder)
    result = verify(folder)
    assert not result.sound
    assert said in failures(result)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**9), ("vocab_size", 10**12)])
def test_sizes_that_no_model_has(key: str, value: int, copy: Callable[[str], Path]) -> None:
    folder = copy("awq")
    edit_json(folder, **{key: value})
    result = verify(folder)
    assert not result.sound
    assert f"config.json: {key} is {value}; a whole number up to" in failures(result)


def plain_recorded(folder: Path, value: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["ledger"][Q]["frobenius"] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_an_error_of_everything_is_never_as_recorded(copy: Callable[[str], Path], tiny: Path) -> None:
    """Zeros of which the ledger says so honestly."""
    folder = copy("awq")
    zero_codes(folder, Q)
    plain_recorded(folder, 1.0)
    told = failures(verify(folder, tiny))
    assert f"{Q} lost 100%" in told
    assert f"{Q} is all zero" in told


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, "NaN", "Infinity", "0.1", True, None, 10**400])
def test_the_ledger_holds_numbers(value: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("awq")
    plain_recorded(folder, value)
    with pytest.raises(QtoolError, match=r"qtool\.json: not"):
        verify(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"parameters": 336512', '"parameters": 1e999'),
        ('"parameters": 336512', '"parameters": -1'),
        ('"damp_percent": 0.1', '"damp_percent": NaN'),
        ('"damp_percent": 0.1', '"damp_percent": "-inf"'),
        ('"damp_percent": 0.1', '"damp_percent": {"deep": [1e999]}'),
        ('"qtool":', '"ledger": {}, "qtool":'),
        ('"bits_per_weight":', '"bits_per_weight": 4.0, "bits_per_weight":'),
    ],
)
def test_the_manifest_is_read_as_everybody_reads_it(old: str, new: str, copy: Callable[[str], Path]) -> None:
    folder = copy("awq")
    text = (folder / MANIFEST).read_text()
    assert old in text
    (folder / MANIFEST).write_text(text.replace(old, new, 1))
    with pytest.raises(QtoolError, match=r"qtool\.json: not"):
        verify(folder)


@pytest.mark.parametrize(
    "name", ["", ".", "a/", "./a", "a//b", "a\\b", "..\\x", "C:x", "a\0b", "a\nb", "/a", "a/../../b", "qtool.json"]
)
def test_names_are_plain_paths_of_the_folder(name: str, copy: Callable[[str], Path]) -> None:
    folder = copy("awq")
    edit_manifest(folder, files={name: {"bytes": 0, "sha256": "0" * 64}})
    with pytest.raises(QtoolError, match="names a file"):
        verify(folder)


def listed(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


SPECIAL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (lambda p: os.mkfifo(p), "special: is a pipe, not a file"),
    "socket": (bind, "special: No such device or address"),
    "folder": (lambda p: p.mkdir(), "special: is a folder, not a file"),
    "link to a device": (lambda p: p.symlink_to("/dev/zero"), "special is a link out of the folder"),
    "link to a file": (lambda p: p.symlink_to("/etc/passwd"), "special is a link out of the folder"),
    "link to itself": (lambda p: p.symlink_to(p), "special: Too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_is_named_and_never_read(kind: str, copy: Callable[[str], Path]) -> None:
    plant, said = SPECIAL[kind]
    folder = copy("awq")
    plant(folder / "special")
    listed(folder, "special")
    result = verify(folder)
    assert said in failures(result)
    assert [c.status for c in result.checks if c.name == "tensors"] == ["not made"]


def test_a_folder_that_is_a_link_leads_nowhere(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder, outside = copy("awq"), tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("x")
    (folder / "sub").symlink_to(outside)
    listed(folder, "sub/secret")
    assert "sub/secret is a link out of the folder" in failures(verify(folder))


def test_weights_that_are_a_pipe_keep_nobody_waiting(copy: Callable[[str], Path]) -> None:
    folder = copy("awq")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert "model.safetensors: is a pipe" in failures(verify(folder))


BESIDE = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "modeling_x.py",
    "pytorch_model.bin",
    "other.gguf",
    "model-00001-of-00002.safetensors",
    "chat_template.jinja",
    "additional_chat_templates/x.jinja",
    "hf_quant_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "Modelfile",
    "custom_generate/generate.py",
    "consolidated.00.pth",
]


@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_and_changes_the_model_is_named(name: str, made: dict[str, Path]) -> None:
    file = made["awq"] / name
    file.parent.mkdir(exist_ok=True)
    try:
        file.write_text("{}")
        _, reasons, _ = check_files(made["awq"], read_manifest(made["awq"]))
        assert any(reason.startswith(name) for reason in reasons), reasons
    finally:
        file.unlink()
        if file.parent != made["awq"]:
            file.parent.rmdir()


def test_a_notice_or_a_picture_is_nobodys_business(made: dict[str, Path]) -> None:
    for name in ("README.md", ".gitattributes", "plot.svg", "qtool-scores.json"):
        (made["nf4"] / name).write_text("x")
    _, reasons, _ = check_files(made["nf4"], read_manifest(made["nf4"]))
    for name in ("README.md", ".gitattributes", "plot.svg", "qtool-scores.json"):
        (made["nf4"] / name).unlink()
    assert reasons == []


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "b.gguf"])
def test_a_signed_stranger_is_still_one(name: str, copy: Callable[[str], Path]) -> None:
    folder = copy("awq")
    (folder / name).write_text("{}")
    sign(folder)
    assert name in failures(verify(folder))


def test_an_index_beside_one_shard_is_ambiguous(copy: Callable[[str], Path]) -> None:
    folder = copy("awq")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    sign(folder)
    assert "some loaders follow the one" in failures(verify(folder))


def test_a_config_that_says_a_key_twice(copy: Callable[[str], Path]) -> None:
    folder = copy("awq")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"hidden_act": "gelu",', 1))
    sign(folder)
    assert "the key 'hidden_act' is there twice" in failures(verify(folder))


def test_every_tensor_is_held_against_the_source(copy: Callable[[str], Path], tiny: Path) -> None:
    """Ledger and codes are honest; what is not quantized is another model's, or took a scale that nothing took back."""
    for number, (name, tensor) in enumerate((("awq", EMBEDDING), ("gptq", NORM), ("nf4", "model.norm.weight"))):
        folder = copy(name).rename(tiny.parent / f"changed-{number}")
        change_tensor(folder, tensor, lambda t: t * 1.5)
        assert verify(folder).sound
        told = failures(verify(folder, tiny))
        assert f"{tensor} is not the source's (differs by" in told
        shutil.rmtree(folder)


def test_fold_scales_hide_nothing(copy: Callable[[str], Path], tiny: Path) -> None:
    folder = copy("gptq")
    change_tensor(folder, f"{Q}.scales", lambda t: t * 2)
    file = folder / "qtool" / "fold_scales.safetensors"
    scales = load_file(file)
    scales[f"{Q}.columns"] *= 2
    save_file(scales, file)
    sign(folder)
    told = failures(verify(folder, tiny))
    assert f"{Q}: its columns are scaled unlike those of mlp.gate_proj" in told


def test_the_source_is_another_folder_and_not_quantized(copy: Callable[[str], Path]) -> None:
    awq, nf4 = copy("awq"), copy("nf4")
    with pytest.raises(QtoolError, match="is the artifact itself"):
        verify(awq, awq)
    with pytest.raises(QtoolError, match="is quantized itself"):
        verify(awq, nf4)


def test_zero_blocks_of_a_gguf_file(copy: Callable[[str], Path], tiny: Path) -> None:
    from qtool.convert.artifact import Artifact

    folder = copy("q8")
    artifact = Artifact.open(folder)
    tensor = artifact.file.tensors["blk.1.ffn_up.weight"]
    start, size = int(tensor.data_offset), int(tensor.nbytes)
    path = artifact.gguf
    assert path is not None
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))
    sign(folder)
    assert "blk.1.ffn_up.weight is all zero" in failures(verify(folder))
    assert "|W - Ŵ|/|W| is 1, the manifest says" in failures(verify(folder, tiny))


def test_strict_json() -> None:
    assert strict_json('{"a": [1, 2.5, {"b": null}]}') == {"a": [1, 2.5, {"b": None}]}
    for text in ("NaN", "[-Infinity]", '{"a": 1e999}', '{"a": {"b": 1, "b": 1}}'):
        with pytest.raises(ValueError, match=r"finite|twice"):
            strict_json(text)


def test_sections_have_no_key_that_readers_would_call_foreign(made: dict[str, Path]) -> None:
    for path in made.values():
        section = json.loads((path / "config.json").read_text()).get("quantization_config")
        if section:
            assert set(section) <= container_of(section).KEYS
    assert NF4_KEYS
    assert len(NF4) == 16
