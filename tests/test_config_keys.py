"""config.json: what transformers takes for missing keys, what a .gguf file can say of it, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.formats.gguf.metadata import model_keys
from qtool.convert.models.config_keys import (
    CHECKED,
    HARMLESS,
    WRITTEN,
    check_config,
    check_gguf,
    keys_read,
    prove_gguf,
)
from qtool.convert.models.family import FULL, SILU, TANH_GELU
from qtool.convert.models.model_config import completed, head_dim, layer_windows, rope_parameters
from qtool.convert.models.rope import rope_factors, rope_keys, rotation
from qtool.convert.models.table import FAMILIES
from qtool.convert.models.tied import check_folder, check_head
from qtool.convert.skeleton import build_skeleton, load_config
from qtool.evaluate.engines.torch_model import load_model
from qtool.sizing.headers import read_headers

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}  # fmt: skip
KINDS = {
    "Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma": "gemma", "Gemma2": "gemma2",
    "Gemma3": "gemma3_text",
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
SLIDES = ["sliding_attention", "full_attention"]
WINDOW = {"use_sliding_window": True, "sliding_window": 8}


def config_of(kind: str = "Llama", **changes: Any) -> dict[str, Any]:
    """As a config.json is; a change to ... leaves the key out."""
    named = {"architectures": [f"{kind}ForCausalLM"], "model_type": KINDS[kind]}
    gemma = {"query_pre_attn_scalar": 32} if kind in ("Gemma2", "Gemma3") else {}
    mistral = {"sliding_window": None} if kind == "Mistral" else {}
    full = SIZES | named | gemma | mistral | changes
    return {key: value for key, value in full.items() if value is not ...}


@pytest.mark.parametrize(("changes", "fault"), [({}, ""), (WINDOW, "does not support `use_sliding_window`")])
def test_transformers_builds_llama_for_iquest_coder(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    named = {"architectures": ["IQuestCoderForCausalLM"], "model_type": "iquestcoder"}
    (tmp_path / "config.json").write_text(json.dumps(SIZES | named | changes))
    if fault:
        with pytest.raises(QtoolError, match=fault):
            load_config(tmp_path)
    else:
        assert type(build_skeleton(load_config(tmp_path))).__name__ == "LlamaForCausalLM"


def skeleton_of(config: dict[str, Any], folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    return build_skeleton(load_config(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    """Where a class has another value for a missing key, a .gguf file without this row would say something else."""
    import transformers

    theirs = getattr(transformers, f"{kind}ForCausalLM").config_class()
    ours = FAMILIES[f"{kind}ForCausalLM"].defaults
    named = ("hidden_act", "hidden_activation", "num_key_value_heads", "max_position_embeddings",
             "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping", "clip_qkv",
             "max_window_layers")  # fmt: skip
    for key in named:
        given = getattr(theirs, key, None)
        if key == "num_key_value_heads" and given == theirs.num_attention_heads and key not in ours:
            continue  # as many as there are heads
        assert ours.get(key) == given, key
    assert type(theirs).tie_word_embeddings == ours.get("tie_word_embeddings", False)
    assert type(theirs).__dict__.get("sliding_window") == ours.get("sliding_window")
    if kind in ("Qwen3", "Gemma", "Gemma2", "Gemma3"):
        assert theirs.head_dim == ours["head_dim"]
    rope = theirs.rope_parameters.get(FULL, theirs.rope_parameters)
    assert rope["rope_theta"] == ours["rope_theta"]


VARIANTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "null": {"rope_scaling": None, "rope_theta": 5e3},
    "default": {"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 1e4}},
    "linear below 1": {"rope_scaling": {"type": "linear", "factor": 0.5}, "rope_theta": 1e4},
    "llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}},
    "llama3, length left out": {
        "rope_scaling": {k: v for k, v in LLAMA3.items() if "original" not in k}, "rope_theta": 5e5,
    },
    "yarn": {"rope_parameters": YARN | {"rope_theta": 1e4}},
    "yarn, old spelling": {"rope_scaling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 64}},
    "yarn, both spellings": {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 3e3},
                             "rope_theta": 2e4},
    "yarn, attention_factor": {"rope_parameters": YARN | {"attention_factor": 1.0}},
    "yarn, mscale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}},
    "yarn, one mscale": {"rope_parameters": YARN | {"mscale": 0.7}},
    "yarn, mscale under attention_factor": {
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3, "attention_factor": 1.3},
    },
    "yarn, betas as they are": {"rope_parameters": YARN | {"beta_fast": 32.0, "beta_slow": 1}},
    "yarn, length left out": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, length outside": {"rope_parameters": YARN, "original_max_position_embeddings": 128},
    "yarn, no factor": {"rope_parameters": YARN | {"factor": None}},
    "yarn by 1": {"rope_parameters": YARN | {"factor": 1.0}},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VARIANTS)
def test_rotary_keys_say_what_transformers_computes(name: str, tmp_path: Path) -> None:
    config = config_of(**VARIANTS[name])
    model = skeleton_of(config, tmp_path)
    prove_gguf(model, config)
    table = model.model.rotary_emb
    radians, magnitude = rotation(rope_keys(config), 32, rope_factors(config))
    torch.testing.assert_close(radians.float(), table.inv_freq, rtol=1e-5, atol=0)
    assert magnitude == pytest.approx(table.attention_scaling, rel=1e-6)


def test_the_magnitude_is_carried_by_the_key_that_llama_cpp_reads() -> None:
    """KL to the source through llama.cpp: 6e-7; with yarn_attn_factor, which it does not read, 4e-2."""
    keys = model_keys(config_of(rope_parameters=YARN | {"attention_factor": 1.0}))
    assert keys["llama.rope.scaling.attn_factor"] == pytest.approx(1 / 1.2079441541679836)
    assert keys["llama.rope.scaling.original_context_length"] == 64
    assert not [key for key in keys if "yarn_" in key]
    assert "llama.rope.scaling.attn_factor" not in model_keys(config_of(rope_parameters=YARN))
    both = model_keys(config_of(rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}))
    usual = 0.1 * math.log(8)
    assert both["llama.rope.scaling.attn_factor"] == pytest.approx((0.7 * usual + 1) / (0.3 * usual + 1) / (usual + 1))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; llama.cpp's llama always computes"),
    ("Qwen3", {"hidden_act": "relu2"}, "hidden_act is 'relu2'"),
    ("Gemma", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
    ("Gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),  # the exact one
    ("Gemma3", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
    ("Gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is set"),
    ("Gemma", {"rope_parameters": LLAMA3}, "'llama3' cannot be written for llama.cpp's gemma"),
    ("Gemma3", {"rope_parameters": {FULL: YARN | {"attention_factor": 1.0}}}, "applies it to sliding layers as well"),
    ("Qwen2", {"rope_parameters": LLAMA3}, "'llama3' cannot be written for llama.cpp's qwen2"),
    ("Qwen3", {"attention_bias": True}, "attention_bias is set; llama.cpp's qwen3 has no biases"),
    ("Gemma2", {"attention_bias": True}, "attention_bias is set; llama.cpp's gemma2 has no biases"),
    ("Llama", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("Llama", {"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast of the rotary scaling is 16"),
    ("Qwen2", {"rope_parameters": YARN | {"beta_slow": 2.0}}, "beta_slow of the rotary scaling is 2.0"),
    ("Qwen3", {"rope_parameters": YARN | {"truncate": False}}, "truncate of the rotary scaling is false"),
    ("Llama", {"rope_parameters": YARN | {"factor": -2.0}}, "factor of the rotary settings is -2.0; a number above 0"),
    ("Llama", {"rope_parameters": YARN | {"factor": 0}}, "factor of the rotary settings is 0; a number above 0"),
    ("Llama", {"rope_parameters": YARN | {"factor": 0.5}}, "yarn by 0.5, which is below 1"),
    ("Llama", {"rope_parameters": YARN | {"factor": "8"}}, "factor of the rotary settings is '8'"),
    ("Llama", {"rope_parameters": YARN | {"attention_factor": -1.0}}, "attention_factor of the rotary settings is -1"),
    ("Llama", {"rope_parameters": {"rope_type": "linear"}}, "factor of the rotary settings is None"),
    ("Llama", {"rope_parameters": {"rope_theta": 0}}, "rope_theta of the rotary settings is 0"),
    ("Llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 0}}, "low_freq_factor of the rotary settings is 0"),
    ("Llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 0.5}}, "low_freq_factor 1 .* not below"),
    ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' cannot be written"),
    ("Llama", {"rope_scaling": {"rope_type": "longrope"}}, "rotary scaling 'longrope' cannot be written"),
    ("Llama", {"rope_scaling": {"rope_type": "proportional"}}, "rotary scaling 'proportional' cannot"),
    ("Qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "reads one set for all layers"),
    ("Gemma3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type would be read by nobody"),
]  # fmt: skip
AMBIGUOUS: list[tuple[str, dict[str, Any], str]] = [  # for every output
    ("Llama", {"rope_parameters": YARN | {"type": "linear"}}, "type 'linear' and rope_type 'yarn'"),
    ("Llama", {"rope_scaling": {"rope_type": "yarn", "type": "default"}}, "type 'default' and rope_type 'yarn'"),
    ("Llama", {"rope_parameters": {"rope_type": "ntk"}}, "rope_type is 'ntk'; known are"),
    ("Llama", {"rope_parameters": YARN | {"factor": "8"}}, "factor is '8'; a positive number"),
    ("Llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 0}}, "low_freq_factor of the rotary settings is 0"),
    ("Llama", {"rope_parameters": [1]}, "rope_parameters is no mapping"),
    ("Gemma2", {"rope_parameters": {FULL: {"rope_theta": 1e5}}}, "reads one set for all layers"),
    ("Llama", {"sliding_window": 8}, "sliding_window is 8, at which the attention of transformers' LlamaForCausalLM"),
    ("Llama", {"attention_chunk_size": 8}, "attention_chunk_size is 8"),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0; a positive whole number"),
    ("Mistral", {"sliding_window": -3}, "sliding_window is -3"),
    ("Mistral", {"sliding_window": 8, "layer_types": SLIDES}, "layer_types lets some layers attend to everything"),
    ("Qwen2", {"layer_types": SLIDES}, "no window for them"),
    ("Qwen3", WINDOW | {"layer_types": SLIDES * 2}, "layer_types names 4 layers, num_hidden_layers is 2"),
    ("Llama", {"is_causal": False}, "is_causal is False"),
    ("Gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("Llama", {"per_layer_config": {"0": {"rms_norm_eps": 0.1}}}, "per_layer_config gives layers"),
    ("Llama", {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 1e4}}, "partial_rotary_factor is 0.5"),
    ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED)
def test_what_a_gguf_file_cannot_say_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(QtoolError, match=f"config.json: .*{message}"):
        check_gguf(config_of(kind, **changes))
    assert check_gguf(config_of(kind)) == []


@pytest.mark.parametrize(("kind", "changes", "message"), AMBIGUOUS)
def test_what_runtimes_read_differently_is_refused_for_every_output(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(kind, **changes)))
    with pytest.raises(QtoolError, match=f"config.json: .*{message}"):
        load_config(tmp_path)
    check_config(config_of(kind))


@pytest.mark.parametrize(
    ("kind", "changes", "count"),
    [
        ("Mistral", {"sliding_window": 8}, 2),
        ("Qwen2", WINDOW | {"max_window_layers": 0}, 2),
        ("Qwen2", WINDOW | {"max_window_layers": 1}, 1),
        ("Qwen3", WINDOW | {"layer_types": SLIDES}, 1),
        ("Qwen2", WINDOW | {"max_window_layers": 2}, 0),
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, 0),
        ("Qwen2", {"sliding_window": 8, "max_window_layers": 0}, 0),  # the switch is off where nothing is said
        ("Mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, 2),  # transformers' own window, 4096
        ("Mistral", {"sliding_window": 512}, 0),  # as long as the context
        ("Llama", {"sliding_window": 4096}, 0),
        ("Gemma3", {"sliding_window": 8, "layer_types": SLIDES}, 0),  # llama.cpp's gemma3 slides
    ],
)
def test_a_window_that_llama_cpp_does_not_have_is_told(kind: str, changes: dict[str, Any], count: int) -> None:
    config = config_of(kind, **changes)
    notes = check_gguf(config)
    size = config.get("sliding_window", 4096)
    started = f"right only up to the window of {size} tokens: config.json's sliding_window lets {count} of 2 layers"
    assert [note.startswith(started) for note in notes] == [True] * bool(count)


def test_windows_are_those_of_the_class() -> None:
    assert layer_windows(config_of("Mistral", sliding_window=8, layer_types=SLIDES), 2) == (8, 8)
    assert layer_windows(config_of("Llama", sliding_window=8), 2) == (None, None)
    assert layer_windows(config_of("Gemma2", sliding_window_pattern=1), 2) == (4096, None)  # Gemma 3 alone reads it
    assert completed(config_of("Mistral", num_key_value_heads=...))["num_key_value_heads"] == 8
    assert completed(config_of("Llama", num_key_value_heads=...))["num_key_value_heads"] == 4
    assert head_dim(config_of("Llama", head_dim=None)) == 32
    assert head_dim(config_of("Gemma", head_dim=...)) == 256


def test_rope_scaling_goes_before_rope_parameters() -> None:
    config = config_of(rope_scaling=YARN, rope_parameters={"rope_type": "default", "rope_theta": 3e3}, rope_theta=2e4)
    assert rope_parameters(config) == YARN | {"rope_theta": 2e4}


def test_activations_by_several_names_are_one() -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-8, 8, 321)
    for names, expected in (
        (SILU.names, torch.nn.functional.silu(x)),
        (TANH_GELU.names, torch.nn.functional.gelu(x, approximate="tanh")),
    ):
        for name in names:
            torch.testing.assert_close(ACT2FN[name](x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_that_the_code_reads_has_a_row(kind: str, tmp_path: Path) -> None:
    """A key that a newer transformers reads fails here, and in a conversion where config.json has it."""
    model = skeleton_of(config_of(kind), tmp_path)
    read = keys_read(model)
    assert {"hidden_size", "rms_norm_eps", "rope_parameters"} <= read
    family = FAMILIES[f"{kind}ForCausalLM"]
    assert family.gguf is not None
    assert family.activation.key in read
    others = {"get_text_config", "standardize_rope_params", "validate_rope", "default_theta", "json"}  # no keys
    assert read - WRITTEN - CHECKED - HARMLESS - family.gguf.says - others == set()
    prove_gguf(model, config_of(kind))


def test_a_key_that_the_code_reads_and_no_row_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(residual_multiplier=0.5, embedding_multiplier=12.0)
    model = skeleton_of(config, tmp_path)
    prove_gguf(model, config)  # Llama's code reads neither
    monkeypatch.setattr("inspect.getsource", lambda _: "x = x * self.config.residual_multiplier")
    with pytest.raises(QtoolError, match=r"residual_multiplier is 0.5; the model's code reads it"):
        prove_gguf(model, config)


def test_the_model_itself_is_compared(tmp_path: Path) -> None:
    """Whatever setting it came from: another activation, another table, another magnitude."""
    config = config_of()
    model = skeleton_of(config, tmp_path)
    table = model.model.rotary_emb
    table.attention_scaling = 1.01
    with pytest.raises(QtoolError, match="turns positions otherwise"):
        prove_gguf(model, config)
    table.attention_scaling, table.inv_freq = 1.0, table.inv_freq * 1.001
    with pytest.raises(QtoolError, match="turns positions otherwise"):
        prove_gguf(model, config)
    table.inv_freq = table.inv_freq / 1.001
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    with pytest.raises(QtoolError, match=r"model\.layers\.1\.mlp computes another activation"):
        prove_gguf(model, config)


@pytest.mark.parametrize("model_type", ["granite", "mistral", "qwen2"])
def test_model_type_and_architecture_are_of_one_model(model_type: str, tmp_path: Path) -> None:
    """transformers goes by the one (Granite multiplies embeddings, Mistral slides), vLLM and qtool by the other."""
    (tmp_path / "config.json").write_text(json.dumps(config_of(model_type=model_type)))
    with pytest.raises(
        QtoolError, match=f"model_type '{model_type}' makes transformers build .*names LlamaForCausalLM"
    ):
        load_config(tmp_path)


def test_how_a_model_answers_is_qtools_to_ask(tmp_path: Path) -> None:
    odd = {"return_dict": False, "output_attentions": True, "output_hidden_states": True, "use_cache": False,
           "attn_implementation": "eager"}  # fmt: skip
    model = skeleton_of(config_of(**odd), tmp_path)
    assert (model.config.return_dict, model.config._attn_implementation) == (True, "sdpa")
    assert not model.config.output_hidden_states
    assert not model.config.output_attentions


def retied(source: Path, folder: Path, flag: bool, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of ``source`` in one shard with another flag and other tensors."""
    folder.mkdir()
    state = {name: tensor for shard in source.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    edit(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": flag}))
    return folder


def test_a_head_that_the_flag_ties_away_is_refused(tiny: Path, tmp_path: Path) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"

    def other(state: dict[str, torch.Tensor]) -> None:
        state[head] = state[embedding].clone()
        state[head][-1, -1] += 1  # one number, the last one

    def same(state: dict[str, torch.Tensor]) -> None:
        state[head] = state[embedding].clone()

    differs = retied(tiny, tmp_path / "differs", True, other)
    message = "tie_word_embeddings of config.json is true, but lm_head.weight and model.embed_tokens.weight are both"
    for look in (
        check_folder,
        lambda path: check_head(Checkpoint.open(path), True),
        lambda path: read_headers(str(path)),
    ):
        with pytest.raises(QtoolError, match=message):
            look(differs)
    with pytest.raises(QtoolError, match=message):
        load_model(Checkpoint.open(differs).read(), load_config(differs), torch.device("cpu"))
    check_folder(retied(tiny, tmp_path / "equal", True, same))
    check_folder(retied(tiny, tmp_path / "untied", False, other))
    renamed = retied(tiny, tmp_path / "renamed", True, lambda state: state.update({head: state.pop(embedding)}))
    with pytest.raises(QtoolError, match=r"only the head\. Rename it to model\.embed_tokens\.weight"):
        check_head(Checkpoint.open(renamed), True)
    bare = retied(tiny, tmp_path / "bare", False, lambda _: None)
    with pytest.raises(QtoolError, match=r"no shard holds lm_head\.weight, and tie_word_embeddings .* false or"):
        check_head(Checkpoint.open(bare), False)
