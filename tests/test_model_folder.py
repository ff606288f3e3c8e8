"""A model's folder as a stranger made it: every damaged, hostile or misplaced one gets a line that says what it is."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.config_file import check_config, read_config
from qtool.convert.files.diagnosis import refuse_quantized
from qtool.convert.files.folder import copy_sidecars, write_config
from qtool.convert.files.licence import read_licence
from qtool.convert.files.reading import leaves_folder
from qtool.convert.files.shard_header import HEADER_LIMIT, INDEX, SINGLE, read_header
from qtool.convert.files.sidecars import check_sidecars, left_out, without_private_paths
from qtool.convert.files.source import asking_the_hub, beside, name_of, resolve
from qtool.convert.skeleton import load_config
from qtool.make.job import open_job, open_source
from qtool.recipe.sections import load_recipe
from qtool.sizing.headers import read_headers

Write = Callable[..., Path]


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy whose weights are one file, without an index."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*")))
    save_file(
        {name: t for shard in tiny.glob("*.safetensors") for name, t in load_file(shard).items()}, folder / SINGLE
    )
    return folder


def edit(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def restore(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE)
    return folder


def _look(folder: Path) -> None:
    open_source(folder)
    check_sidecars(folder)


def shard(path: Path, header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (entry(shape=[2, 0], data_offsets=[0, 0]), r"a has shape \[2, 0\] and holds no number.*ZeRO-3"),
        (entry(shape=[-2]), "no sizes"),
        (entry(shape=[2**63]), "no sizes"),
        (entry(shape=[True, 2]), "no sizes"),
        (entry(shape=[2.0]), "no sizes"),
        (entry(shape="2"), "no sizes"),
        (entry(shape=[1] * 9), "no sizes"),
        (entry(shape=[3]), r"a takes 8 bytes, its shape \[3\] in F32 12"),
        (entry(shape=[2**31, 2**31]), "a takes 8 bytes"),
        (entry(dtype="F16"), r"a takes 8 bytes, its shape \[2\] in F16 4"),
        (entry(dtype=7), "a has no dtype"),
        (entry(dtype="F99"), "a is stored as 'F99', which is no dtype"),
        (entry(data_offsets=[8, 0]), "a takes -8 bytes"),
        (entry(data_offsets=[4, 12]), "a lies behind a gap"),
        (entry(data_offsets=[0, 8, 16]), "a lacks"),
        (entry() | {"b": entry()["a"]}, "b overlaps the tensor before it"),
        ({"a": 1}, "a lacks"),
        ({"a\n\x1b[2J": entry()["a"]}, "is no name of a tensor"),
        ({"../a": entry()["a"]}, "is no name of a tensor"),
        ({"a" * 501: entry()["a"]}, "is no name of a tensor"),
        ({"": entry()["a"]}, "is no name of a tensor"),
        (entry() | {"__metadata__": {"format": 1}}, "__metadata__ holds something other than text"),
        (entry() | {"__metadata__": [1]}, "__metadata__ holds something other than text"),
        (json.dumps(entry()).encode()[:-1] + b"," + json.dumps(entry()).encode()[1:], "its header holds a twice"),
        (b"[1]", "no JSON object"),
        (b'{"a":' * 50_000, "no JSON"),
        (b"\xff", "no JSON"),
    ],
)
def test_headers_that_lie(header: Any, said: str, tmp_path: Path) -> None:
    path = shard(tmp_path / "x.safetensors", header)
    with pytest.raises(QtoolError, match=rf"x\.safetensors: not a whole safetensors file \(.*{said}"):
        read_header(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9])
def test_a_header_longer_than_the_file(length: int, tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match="the whole file has"):
        read_header(shard(tmp_path / "x", entry(), length=length))


def test_a_header_of_100_mb_is_not_read(tmp_path: Path) -> None:
    path = shard(tmp_path / "x", entry(), length=100 * 10**6)
    os.truncate(path, 200 * 10**6)  # holes: takes no disk
    with pytest.raises(QtoolError, match="its header takes 100 MB; qtool reads at most 32"):
        read_header(path)
    assert HEADER_LIMIT == 32 * 10**6


def test_a_file_longer_or_shorter_than_its_tensors(tmp_path: Path) -> None:
    for data, said in ((b"", "the file has 0 for them"), (bytes(9), "the file has 9 for them")):
        with pytest.raises(QtoolError, match=f"its tensors take 8 bytes, {said}"):
            read_header(shard(tmp_path / "x", entry(), data))
    (tmp_path / "x").write_bytes(b"1234567")
    with pytest.raises(QtoolError, match="the whole file has 7"):
        read_header(tmp_path / "x")


def test_a_header_reads_as_the_library_reads_it(tiny: Path) -> None:
    from safetensors import safe_open

    for path in tiny.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            assert read_header(path) == {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
            assert list(read_header(path)) == names


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda p: p.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json", "generation_config.json"])
def test_special_files_are_refused(make: Callable[[Path], object], name: str, model: Path) -> None:
    (model / name).unlink()
    make(model / name)
    with pytest.raises(QtoolError, match=rf"{name}: (is a (folder|pipe)|is a link that leaves)"):
        _look(model)


def test_an_index_that_is_special_or_names_other_shards(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    index = json.loads((folder / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    first = next(name for name, shard in index["weight_map"].items() if shard == names[0])
    index["weight_map"][first] = names[-1]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(QtoolError, match=rf"says that {names[-1]} holds {first} \(1 such\); {names[0]} does"):
        Checkpoint.open(folder)
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)
    with pytest.raises(QtoolError, match="is a pipe"):
        Checkpoint.open(folder)


def test_links_that_leave_the_folder(model: Path, tmp_path: Path) -> None:
    real = model / SINGLE
    for name in (SINGLE, "config.json", "tokenizer_config.json", "LICENSE"):
        outside = tmp_path / "outside"
        folder = Path(shutil.copytree(model, tmp_path / f"linked-{name}"))
        shutil.copy(folder / name if (folder / name).exists() else real, outside)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside)
        with pytest.raises(QtoolError, match=rf"{name}: is a link that leaves its folder"):
            _look(folder)
    assert read_licence(tmp_path / "linked-LICENSE") == {}


def test_links_of_the_hubs_cache_stay(tmp_path: Path) -> None:
    """Blobs of the repository, its shared store, and both from a folder inside a snapshot; nothing that looks alike."""
    home = tmp_path / "models--a--b"
    inside = home / "snapshots" / "0123" / "sub"
    shared = tmp_path / "blobs" / "ab" / ("ab" + "0" * 62)
    for folder in (inside, home / "blobs", shared.parent, tmp_path / "plain/snapshots/x", tmp_path / "plain/blobs"):
        folder.mkdir(parents=True)
    shared.touch()
    (tmp_path / "blobs" / "secret").touch()
    (home / "blobs" / "f00").touch()
    (home / "blobs" / "xet").symlink_to(shared)
    (tmp_path / "plain/blobs/key").touch()
    links = {
        "own": home / "blobs/f00", "xet": home / "blobs/xet", "secret": tmp_path / "blobs/secret",
        "up": home / "refs-main", "middle": inside / "out" / "key",
    }  # fmt: skip
    (inside / "out").symlink_to(tmp_path / "plain/blobs")
    for name, target in links.items():
        (inside / name).symlink_to(target)
    assert {name: leaves_folder(inside, inside / name) for name in links} == {
        "own": False, "xet": False, "secret": True, "up": True, "middle": True,
    }  # fmt: skip
    (tmp_path / "plain/snapshots/x/key").symlink_to(tmp_path / "plain/blobs/key")
    assert leaves_folder(tmp_path / "plain/snapshots/x", tmp_path / "plain/snapshots/x/key")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9), ("num_hidden_layers", 10**30), ("num_hidden_layers", 10**4000),
        ("num_hidden_layers", 0), ("num_hidden_layers", -1), ("num_hidden_layers", "2"), ("num_hidden_layers", 2.0),
        ("num_hidden_layers", True), ("num_hidden_layers", [2]), ("vocab_size", 10**12), ("vocab_size", -5),
        ("hidden_size", 10**9), ("hidden_size", 2**63), ("hidden_size", -128), ("intermediate_size", 10**10),
        ("num_attention_heads", 0), ("num_attention_heads", 3), ("num_key_value_heads", 0), ("num_key_value_heads", 3),
        ("head_dim", 0), ("head_dim", 10**6), ("max_position_embeddings", "x"), ("max_position_embeddings", 10**15),
        ("max_position_embeddings", float("inf")), ("rms_norm_eps", float("nan")), ("rms_norm_eps", "x"),
        ("rms_norm_eps", 0), ("rope_theta", "x"), ("rope_theta", -1.0), ("rope_scaling", "yarn"),
        ("rope_scaling", {"rope_type": "evil"}), ("rope_scaling", {"type": "yarn", "factor": "4"}),
        ("rope_scaling", {"type": "yarn", "factor": 0}), ("rope_scaling", {"rope_type": 7}),
        ("rope_scaling", {"rope_type": "longrope", "long_factor": [1, "x"]}),
        ("rope_scaling", {"beta_fast": {"a": "b"}}),
        ("hidden_act", 3), ("hidden_act", ""), ("model_type", 5), ("model_type", "../../x"), ("dtype", "evil"),
        ("torch_dtype", "float8_e4m3fn"), ("torch_dtype", 16), ("tie_word_embeddings", "yes"), ("attention_bias", 1),
        ("_attn_implementation", "evil/kernel"), ("architectures", 5), ("architectures", [5]),
        ("architectures", "LlamaForCausalLM"), ("sliding_window", -1), ("sliding_window", "8"), ("layer_types", "full"),
        ("layer_types", ["full_attention"]), ("eos_token_id", "x"), ("eos_token_id", [0, 2.5]), ("bos_token_id", 2**40),
        ("quantization_config", "awq"), ("auto_map", ["x"]), ("text_config", 5),
        ("text_config", {"vocab_size": 10**12}),
        ("__class__", "x"), ("update", 1), ("unknown", float("-inf")), ("unknown", {"a": [10**20]}),
    ],
)  # fmt: skip
def test_values_that_no_model_has(key: str, value: Any) -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, key: value}
    with pytest.raises(QtoolError, match=rf"^c\.json: .*{key}|^c\.json: .*hidden_size") as error:
        check_config(config, "c.json")
    assert len(error.value.message) < 400


def test_values_that_models_have() -> None:
    """Of published config.json files: nothing here may be refused."""
    for folder in sorted(Path(__file__).parent.glob("data/iquest/*")):
        read_config(folder)
    yarn = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "mscale": 1, "truncate": False, "rope_theta": 1e6}
    kinds = {"full_attention": yarn, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    for changes in (
        {"pad_token_id": -1}, {"eos_token_id": [1, 2]}, {"sliding_window": None}, {"rope_scaling": None},
        {"rope_parameters": kinds}, {"head_dim": None}, {"torch_dtype": "torch.bfloat16"}, {"sliding_window": 0},
        {"rope_scaling": {"type": "su", "long_factor": [1.0, 2], "short_factor": [1]}}, {"bos_token_id": None},
        {"hidden_act": "gelu_pytorch_tanh"}, {"quantization_config": None}, {"max_position_embeddings": 10_485_760},
    ):  # fmt: skip
        check_config({"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, **changes}, "c.json")


@pytest.mark.parametrize("layers", [3, 1000, 10**9])
def test_layers_are_counted_before_a_model_is_built(layers: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.make.job.build_skeleton", lambda *_: pytest.fail("built"))
    edit(model, num_hidden_layers=layers)
    for look in (open_source, lambda folder: read_headers(str(folder))):
        with pytest.raises(QtoolError, match=r"config\.json: num_hidden_layers is"):
            look(model)


@pytest.mark.parametrize("change", [{"vocab_size": 321}, {"hidden_size": 256}, {"intermediate_size": 257}])
def test_sizes_are_compared_before_a_model_is_built(change: dict[str, int], model: Path) -> None:
    for look in (open_source, lambda folder: read_headers(str(folder))):
        with pytest.raises(QtoolError, match=rf"config\.json implies {next(iter(change))}"):
            look(edit(model, **change))


@pytest.mark.parametrize("change", [{"max_position_embeddings": None}, {"hidden_act": "evil"}, {"model_type": "evil"}])
def test_what_transformers_refuses_is_a_line(change: dict[str, Any], model: Path, write_recipe: Write) -> None:
    recipe = load_recipe(write_recipe(model=str(edit(model, **change))))
    with pytest.raises(QtoolError, match=r"config\.json: transformers cannot make a model of it: "):
        open_job(recipe, resolve(str(model)), torch.device("cpu"), recipe.outputs)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float64, torch.bool])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_integer_weights_are_no_weights(dtype: torch.dtype, name: str, model: Path, write_recipe: Write) -> None:
    restore(model, lambda tensors: tensors | {name: tensors[name].to(dtype)})
    recipe = load_recipe(write_recipe(model=str(model)))
    with pytest.raises(QtoolError, match=rf"{SINGLE}: {name} is stored as .*FP16, BF16 or FP32"):
        open_job(recipe, resolve(str(model)), torch.device("cpu"), recipe.outputs)


def test_tensors_of_other_models(model: Path, write_recipe: Write) -> None:
    """A value head is left out and said; what stands among the model's own tensors is refused."""
    recipe = load_recipe(write_recipe(model=str(model)))
    head = {"v_head.summary.weight": torch.zeros(1, 128), "v_head.summary.bias": torch.zeros(1, dtype=torch.int32)}
    restore(model, lambda tensors: tensors | head)
    job = open_job(recipe, resolve(str(model)), torch.device("cpu"), recipe.outputs)
    assert job.notes == (
        "left out, no part of LlamaForCausalLM: v_head.summary.bias, v_head.summary.weight (2 tensors)",
    )
    assert not set(head) & (set(job.checkpoint.tensors) | set(job.output("awq").plan.specs))
    for name in ("model.norm.bias", "lm_head.bias", "model.extra"):
        restore(model, lambda tensors, name=name: tensors | {name: torch.zeros(128)})
        with pytest.raises(QtoolError, match=rf"holds {name} \(1 such\), which config\.json does not imply"):
            open_job(recipe, resolve(str(model)), torch.device("cpu"), recipe.outputs)
        restore(model, lambda tensors, name=name: {n: t for n, t in tensors.items() if n != name})


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, r"quantized already \(awq, 4 bits\)"),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}, r"\(bitsandbytes NF4\)"),
        ({"quant_method": "fp8"}, r"\(fp8\)"), ({"quant_method": "mxfp4"}, r"\(mxfp4\)"),
        ({"quant_method": "hqq"}, r"\(hqq\)"), ({"bits": True}, "method not named"),
    ],
)  # fmt: skip
def test_config_says_quantized(section: dict[str, Any], said: str, model: Path) -> None:
    with pytest.raises(QtoolError, match=rf"{said}.*unquantized release"):
        open_source(edit(model, quantization_config=section))


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("qweight", "AWQ or GPTQ"), ("weight_packed", "compressed-tensors"), ("weight_scale_inv", "FP8"),
        ("W_q", "HQQ"),
        ("SCB", "8-bit"), ("trellis", "EXL3"), ("lora_A.weight", "an adapter was not merged"),
        ("base_layer.weight", "an adapter was not merged"), ("lora_B.default.weight", "an adapter was not merged"),
    ],
)  # fmt: skip
def test_names_say_quantized_or_adapted(end: str, said: str, tmp_path: Path) -> None:
    name = f"model.layers.0.self_attn.q_proj.{end}"
    with pytest.raises(QtoolError, match=rf"holds {name}: .*{said}"):
        refuse_quantized(tmp_path, {}, ["model.norm.weight", name])


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "qmodel.pt").touch()
    with pytest.raises(QtoolError, match=r"only pickle weights \(qmodel\.pt\)"):
        open_source(tmp_path)
    (tmp_path / "x-Q4_K_M.gguf").touch()
    with pytest.raises(QtoolError, match=r"only GGUF \(x-Q4_K_M\.gguf\).*quantized already.*unquantized release"):
        open_source(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    save_file({"model.norm.weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    for look in (open_source, lambda folder: read_headers(str(folder)) if not (folder / "config.json").exists() else
                 open_source(folder)):  # fmt: skip
        with pytest.raises(QtoolError, match=r"an adapter \(LORA\) of org/base, not a model\. Merge it first"):
            look(tmp_path)
        (tmp_path / "config.json").unlink(missing_ok=True)
    (tmp_path / "inner").mkdir()
    for path in (*tmp_path.glob("*.*"),):
        path.unlink()
    (tmp_path / "inner/model.safetensors").touch()
    with pytest.raises(QtoolError, match="Its folder inner has some"):
        open_source(tmp_path)


def test_an_adapter_beside_shards_is_not_the_models(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (folder / INDEX).unlink()
    before = set(Checkpoint.open(folder).tensors)
    for name in ("adapter_model", "optimizer", "consolidated", "anything"):
        save_file({f"{name}.weight": torch.zeros(2)}, folder / f"{name}.safetensors")
    assert set(Checkpoint.open(folder).tensors) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["NewMoeForCausalLM"], "num_local_experts": 8}, r"experts \(num_local_experts: 8\)"),
        ({"architectures": ["GptOssForCausalLM"], "num_local_experts": 32}, "not quantized yet: its experts .* MXFP4"),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}}, r"several parts \(text_config\)"),
        ({"architectures": ["BertModel"]}, "no causal language model"),
        ({"architectures": ["NewForCausalLM"]}, "not known to qtool"),
        ({"architectures": None}, "none named"),
    ],
)  # fmt: skip
def test_architectures_that_qtool_does_not_quantize(change: dict[str, Any], said: str, model: Path) -> None:
    with pytest.raises(QtoolError, match=rf"config\.json: architecture .*{said}.*Known: LlamaForCausalLM"):
        open_source(edit(model, **change))


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda n: f"_orig_mod.{n}", r"torch\.compile's wrapper"),
        (lambda n: f"module.{n}", "data-parallel"),
        (lambda n: f"language_model.{n}", "multimodal"),
        (lambda n: n.replace("model.", "model.language_model."), "multimodal"),
        (lambda n: f"base_model.model.{n}", "merge_and_unload"),
        (lambda n: n.removeprefix("model."), "the base model alone"),
    ],
)
def test_names_under_a_wrapper(rename: Callable[[str], str], said: str, model: Path, write_recipe: Write) -> None:
    restore(model, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    recipe = load_recipe(write_recipe(model=str(model)))
    with pytest.raises(QtoolError, match=rf"implies a tensor model\.embed_tokens\.weight.*It holds .*{said}"):
        open_job(recipe, resolve(str(model)), torch.device("cpu"), recipe.outputs)


def test_code_for_a_class_that_transformers_has(model: Path) -> None:
    edit(model, auto_map={"AutoConfig": "x.C"})
    with pytest.raises(QtoolError, match=r"trust_remote_code: true.*class of its own for model_type llama"):
        load_config(model)
    edit(model, model_type="evil")
    with pytest.raises(QtoolError, match="trust_remote_code: true") as error:
        load_config(model)
    assert "of its own for" not in error.value.message


LEFTOVERS = (
    "adapter_config.json", "trainer_state.json", "wandb-metadata.json", "training_args.json", "notes.txt",
    "all_results.json",
    "hf_quant_config.json", "quantize_config.json", "qtool.json", "requirements.txt",
)  # fmt: skip


def test_only_the_models_own_files_are_carried(model: Path, tmp_path: Path) -> None:
    for name in (*LEFTOVERS, "LICENSE", "NOTICE.txt", "merges.txt", "code.py", INDEX, "generation_config.json"):
        (model / name).write_text("{}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool.jinja").write_text("{{ x }}")
    (tmp_path / "artifact").mkdir()
    copy_sidecars(model, tmp_path / "artifact", with_code=False)
    carried = {p.relative_to(tmp_path / "artifact").as_posix() for p in (tmp_path / "artifact").rglob("*.*")} | {
        "LICENSE"
    }
    assert carried == {
        "LICENSE", "NOTICE.txt", "merges.txt", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "additional_chat_templates/tool.jinja",
    }  # fmt: skip
    assert set(left_out(model)) == set(LEFTOVERS)


def test_private_paths_stay_behind(model: Path, tmp_path: Path) -> None:
    """Byte for byte but for them; a token that looks like one stays, as does a vocabulary."""
    edit(model, _name_or_path="/home/someone/private/Base-7B", text_config={"_name_or_path": "C:\\Users\\x\\Base"})
    text = '{\n "name_or_path":  "/home/someone/x y/Base",\n "a": "\\/home\\/someone/Base",\n "b": "org/name",'
    text += ' "c": "/think"}'
    (model / "tokenizer_config.json").write_text(text)
    (model / "vocab.json").write_text('{"/home/someone/x": 1}')
    copy_sidecars(model, tmp_path, with_code=False)
    write_config(model, tmp_path, {}, None, {})
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert said == {"name_or_path": "Base", "a": "Base", "b": "org/name", "c": "/think"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["_name_or_path"], config["text_config"]) == ("Base-7B", {"_name_or_path": "Base"})
    assert (tmp_path / "vocab.json").read_text() == '{"/home/someone/x": 1}'
    (model / "tokenizer_config.json").write_text(text.split('"a"')[0] + '"d":   1}')
    copy_sidecars(model, tmp_path, with_code=False)
    expected = text.split('"a"')[0].replace("/home/someone/x y/Base", "Base") + '"d":   1}'
    assert (tmp_path / "tokenizer_config.json").read_text() == expected


def test_what_is_a_private_path() -> None:
    for path in (
        "/home/a/Base",
        "~/models/Base",
        "../out/Base",
        "file:///mnt/Base",
        "\\\\host\\share\\Base",
        "D:/x/Base/",
    ):
        assert without_private_paths({"k": [path]}) == {"k": ["Base"]}, path
    for text in ("org/name", "/think", "</s>", "https://a.b/c", "a/b/c", "", "{{ '/a/b' }}\n/c"):
        assert without_private_paths({"k": text}) == {"k": text}, text
    assert without_private_paths({"content": "/usr/bin", "eos_token": "/a/b"}) == {
        "content": "/usr/bin",
        "eos_token": "/a/b",
    }


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("My Model", "My-Model"), ("-rf", "rf"), (".hidden", "hidden"), ("modèle-ü", "modèle-ü"), ("a;b $(c)", "a-b-c"),
        ("x" * 200, "x" * 120), ("--", "model"), ("new\nline", "new-line"), ("SmolLM2-135M", "SmolLM2-135M"),
        ("a--b", "a--b"),
    ],
)  # fmt: skip
def test_names_of_artifacts(folder: str, name: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    assert name_of(tmp_path / folder) == name


def test_one_name_whatever_path_leads_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(model)
    (model / "sub").mkdir()
    for where, path in ((model, "."), (model, "./"), (model / "sub", ".."), (tmp_path, "model/"), (tmp_path, "./model"),
                        (tmp_path, "link"), (tmp_path, "link/sub/.."), (tmp_path, str(model))):  # fmt: skip
        monkeypatch.chdir(where)
        found = resolve(path)
        assert (found.name, found.path, read_headers(path).name) == ("model", model, "model"), path
    monkeypatch.chdir(model)
    assert read_headers("config.json").name == "model"
    assert name_of(Path("/")) == "model"


def test_a_snapshot_of_the_hubs_cache_has_the_repositorys_name(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--My-Coder.1/snapshots/0123abc"
    (snapshot / "fp16").mkdir(parents=True)
    assert name_of(snapshot) == "My-Coder.1"
    assert name_of(snapshot / "fp16") == "My-Coder.1-fp16"


@pytest.mark.parametrize("path", ["~nouser_x/y", "a\0b", "x" * 5000])
def test_paths_that_cannot_be(path: str) -> None:
    for look in (resolve, read_headers):
        with pytest.raises(QtoolError) as error:
            look(path)
        assert len(error.value.message) < 400


def test_a_hub_id_that_may_be_a_mistyped_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "artifacts" / "demo-awq").mkdir(parents=True)
    (tmp_path / "artifacts" / ".hidden").mkdir()
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(
            QtoolError, match=r"reached \(OSError\)\. Nor is it a folder here: artifacts holds demo-awq\. Do"
        ),
        asking_the_hub("artifacts/nothing", None, "Do."),
    ):
        raise OSError
    assert beside("org/name") == ""
