"""What is refused, or said, before any weight is read: by `run` and by `plan` alike, naming file, key and reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import QtoolError
from qtool.convert.files.config_file import check_config
from qtool.convert.files.sidecars import check_sidecars
from qtool.convert.formats.gguf.chat_form import learn
from qtool.convert.formats.gguf.stops import find_stops
from qtool.convert.formats.gguf.types import tensor_types
from qtool.convert.formats.gguf.vocab import around_texts
from qtool.convert.skeleton import load_config
from qtool.convert.text.shapes import row_of
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.evaluate.engines.llama_cpp import serve
from qtool.make.device import choose_device
from qtool.preparing import prepare
from qtool.run import run
from qtool.sizing.formats import weights_of
from qtool.sizing.headers import read_headers


def edited(source: Path, target: Path, file: str = "config.json", **changes: Any) -> Path:
    """A copy of a model; a change to ... leaves the key out."""
    shutil.copytree(source, target)
    path = target / file
    data = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    return target


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "", "cuda:0:1"])
def test_a_device_that_is_none(name: str) -> None:
    with pytest.raises(QtoolError, match="is none of auto, cpu, cuda, cuda:N") as error:
        choose_device(name)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("there", "name", "fine"), [(0, "cuda", 0), (2, "cuda:1", 1), (2, "cuda:2", 0), (2, "auto", 1)]
)
def test_a_device_that_is_not_there(there: int, name: str, fine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    if fine:
        assert choose_device(name).type == "cuda"
        return
    with pytest.raises(QtoolError, match=r"torch sees (no accelerator|2 accelerators, numbered from 0) here") as error:
        choose_device(name)
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output_dir": "~nouser_x/y"}, "no such user's home folder"),
        ({"outputs": [{"method": "gguf", "imatrix": "~nouser_x/y"}]}, "no such user's home folder"),
        (
            {"calibration": {"text": "qtool-code", "samples": 2, "length": 257}},
            "length 257 is more than the 256",
        ),
    ],
)
def test_a_recipe_that_cannot_be(
    changes: dict[str, Any], said: str, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(QtoolError, match=said) as error:
        prepare(write_recipe(**changes), "cpu", runs=tmp_path / "runs")
    assert error.value.exit_code == 2


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [1e300, 1e-300, 4e38])
def test_a_number_that_float32_does_not_hold(key: str, value: float) -> None:
    with pytest.raises(QtoolError, match=rf"x: {key} is .*; a number from 1e-37 to 3e\+38 is needed"):
        check_config({key: value}, "x")


def test_two_architectures_are_not_one(tiny: Path, tmp_path: Path) -> None:
    """transformers goes by model_type, a .gguf file would by the first name: its norms would be off by one."""
    folder = edited(tiny, tmp_path / "m", architectures=["GemmaForCausalLM", "LlamaForCausalLM"])
    with pytest.raises(QtoolError, match="makes transformers build LlamaForCausalLM, but architectures names Gemma"):
        load_config(folder)


def test_attentions_that_the_named_attention_does_not_give(tiny: Path, tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "m", output_attentions=True, _attn_implementation="flash_attention_2")
    with pytest.raises(QtoolError, match="output_attentions is true, and the attention named is 'flash_attention_2'"):
        load_config(folder)


@pytest.mark.parametrize("type_name", ["Q4_K_M", "Q8_0"])
def test_a_gguf_type_that_hardly_fits(type_name: str, model_maker: Callable[..., Path], tmp_path: Path) -> None:
    """Rows that 32 does not divide stay in 16 bits: `verify` would call the file unsound, so nobody makes it."""
    folder = model_maker(tmp_path / "m", intermediate_size=144)
    headers = read_headers(str(folder))
    with pytest.raises(
        QtoolError, match=rf"type: {type_name} would leave 14\.8% .*: blk\.0\.ffn_down\.weight and 1 more"
    ):
        weights_of(headers, type_name)
    assert weights_of(headers, "F16").bits_per_weight > 16
    types = tensor_types({"blk.0.ffn_down.weight": (128, 144)}, type_name, 2)
    assert types["blk.0.ffn_down.weight"].type == "F16"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sliding_window": 16}, "sliding_window is 16"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "no window for them"),
        ({"is_causal": False}, "is_causal is False"),
    ],
)
def test_plan_refuses_what_run_refuses(changes: dict[str, Any], said: str, tiny: Path, tmp_path: Path) -> None:
    headers = read_headers(str(edited(tiny, tmp_path / "m", **changes)))
    for name in ("awq-g32", "gptq-g32", "nf4", "Q4_K_M"):
        with pytest.raises(QtoolError, match=said):
            weights_of(headers, name)
    assert weights_of(headers, "source").nbytes


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 16}])
def test_plan_compares_config_and_headers(changes: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match=r"config\.json implies"):
        read_headers(str(edited(tiny, tmp_path / "m", **changes)))


@pytest.mark.parametrize("part", ["layers.1.mlp.down_proj", "layers.0.input_layernorm"])
def test_a_weight_of_zeros(part: str, tiny: Path, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "m")
    for shard in folder.glob("*.safetensors"):
        state = load_file(shard)
        if f"model.{part}.weight" in state:
            state[f"model.{part}.weight"].zero_()
            save_file(state, shard, {"format": "pt"})
    with pytest.raises(QtoolError, match=rf"{folder}: model\.{part}\.weight: the source weight is all zero"):
        run(write_recipe(model=str(folder), outputs=[{"method": "nf4"}]), tmp_path / "runs", "cpu")


def test_half_of_a_character_is_named() -> None:
    with pytest.raises(QtoolError, match="t:3: holds half of a character"):
        row_of({"text": "a\ud800"}, None, "t:3")
    with pytest.raises(QtoolError, match="t:4: holds half of a character"):
        row_of({"messages": [{"role": "user", "content": "\udc00"}]}, None, "t:4")
    assert row_of({"text": "\U0001f680"}, None, "t:5") == "\U0001f680"


def test_a_link_to_nothing_is_no_missing_file(tiny: Path, tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "m")
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("gone.json")
    with pytest.raises(QtoolError, match=r"generation_config\.json: no such file"):
        check_sidecars(folder)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}, r"tokenizer_config\.json: chat_template is "),
        ("tokenizer_config.json", {"chat_template": 5}, r"tokenizer_config\.json: chat_template is 5"),
    ],
)
def test_templates_of_a_wrong_shape(file: str, changes: dict[str, Any], said: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match=said):
        load_tokenizer(edited(tiny, tmp_path / "m", file, **changes))


def test_a_map_that_is_a_list(tiny: Path, tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "m")
    (folder / "special_tokens_map.json").write_text("[]")
    with pytest.raises(QtoolError, match=r"special_tokens_map\.json: expected a JSON object"):
        load_tokenizer(folder)


def test_merges_at_random(tiny: Path, tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "m")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(QtoolError, match=r"tokenizer\.json: model\.dropout is 0\.5"):
        load_tokenizer(folder)


def test_marks_around_every_text_are_said(tiny: Path, tmp_path: Path) -> None:
    folder = edited(tiny, tmp_path / "m")
    assert around_texts(folder, load_tokenizer(folder)) == []
    raw = json.loads((folder / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    raw["post_processor"] = {
        "type": "TemplateProcessing", "single": [end, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [0], "tokens": ["<eos>"]}},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert around_texts(folder, load_tokenizer(folder)) == [
        "the tokenizer puts '<eos>' before every text, which a .gguf file cannot say"
    ]
    asks = edited(tiny, tmp_path / "n", "tokenizer_config.json", bos_token="def", add_bos_token=True)
    assert "llama.cpp puts it there; the tokenizer" in around_texts(asks, load_tokenizer(asks))[0]


def test_a_token_beyond_the_embedding_ends_nothing(tmp_path: Path) -> None:
    class Tokens:
        eos_token_id = 0
        added_tokens_decoder: ClassVar[dict[int, str]] = {0: "<eos>"}

        def get_vocab(self) -> dict[str, int]:
            return {"<eos>": 0, "a": 1, "<|endoftext|>": 9}

    assert find_stops(tmp_path, Tokens(), {}, 5).notes == []
    assert "also ends an answer at <|endoftext|>" in find_stops(tmp_path, Tokens(), {}, 10).notes[0]


def test_a_template_that_llama_cpp_cannot_read(tiny: Path, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """`random` is a filter of Jinja that llama.cpp's own lacks; an unknown name of split rules is another reason."""
    pytest.importorskip("xllamacpp")
    folder = edited(tiny, tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ [1]|random }}{% endfor %}")
    learnt = learn(load_tokenizer(folder))
    assert learnt is not None
    assert learnt.prompts
    outputs = [{"method": "gguf", "type": "F16"}]
    with pytest.raises(QtoolError, match="it cannot read the model's chat template") as error:
        run(write_recipe(model=str(folder), outputs=outputs), tmp_path / "runs", "cpu")
    assert error.value.exit_code == 2
    outputs[0]["pre_tokenizer"] = "nonsense"
    with pytest.raises(QtoolError, match="output 'gguf' has `pre_tokenizer: nonsense`") as error:
        run(write_recipe(outputs=outputs), tmp_path / "runs", "cpu")
    assert error.value.exit_code == 2
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(QtoolError, match="not a whole GGUF file"), serve(tmp_path / "x.gguf", 64):
        pass
