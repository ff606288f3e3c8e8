"""Outputs that keep some linears in 16 bits or give some their own settings: what each container says, what it holds,
and who loads it. scripts/check_modules.py asks vLLM and GPTQModel."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import qtool
from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.formats.apart import find_apart, matched
from qtool.convert.formats.gptq_dynamic import changed, left_out
from qtool.convert.formats.table import container_of
from qtool.convert.runtimes import vllm
from qtool.evaluate.engines import llama_cpp
from qtool.evaluate.engines import server as served
from qtool.evaluate.engines.torch_model import load_model
from qtool.recipe.sections import checked_recipe
from qtool.report.loading import what_loads_it

AT = "model.layers."
LINEARS = [
    f"{AT}{layer}.{kind}"
    for layer in (0, 1)
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                 "mlp.up_proj", "mlp.down_proj")
]  # fmt: skip
PLAIN = {"method": "gptq", "group_size": 64, "propagate_error": False, "descent": False}
OUTPUTS: list[dict[str, Any]] = [
    {"method": "awq", "name": "awq", "group_size": 32, "ignore": ["down_proj", "self_attn.?_proj"]},
    {"method": "gptq", "name": "gptq", "group_size": 64, "ignore": [f"{AT}0.mlp.*"],
     "modules": {"down_proj": {"bits": 8, "group_size": 32}}},
    {"method": "gptq", "name": "folded", "group_size": 32, "scaling": "awq",
     "ignore": ["self_attn.*", f"{AT}1.mlp.down*"]},
    {"method": "gptq", "name": "ct", "format": "compressed-tensors", "group_size": 64, "ignore": ["o_proj"],
     "modules": {"mlp.*": {"group_size": 32}, "down_proj": {"bits": 8}}},
    {"method": "nf4", "name": "nf4", "ignore": ["self_attn.*"]},
    {"method": "gguf", "name": "gguf", "type": "Q8_0", "ignore": ["o_proj"], "imatrix": False,
     "modules": {"v_proj": {"type": "Q5_0"}, "embed_tokens": {"type": "F16"}}},
    PLAIN | {"name": "mixed", "modules": {"down_proj": {"bits": 8, "group_size": 32}},
             "ignore": [f"{AT}0.self_attn.*"]},
    PLAIN | {"name": "all-64"},
    PLAIN | {"name": "all-32", "bits": 8, "group_size": 32},
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("xllamacpp")
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"def f{i}(a, b):\n    return a * {i} + b\n\n\n" for i in range(400)))
    folder = tmp_path_factory.mktemp("modules")
    return qtool.convert(tiny, OUTPUTS, {"text": str(text), "samples": 4, "length": 64}, folder=folder)


def convert_one(tiny: Path, output: Mapping[str, Any], folder: Path) -> None:
    qtool.convert(tiny, [{"method": "nf4", "rounding": "absmax", **output}], folder=folder)


def test_patterns_name_linears_by_a_whole_name_or_its_end() -> None:
    found = find_apart(
        {"ignore": ["o_proj", f"{AT}1.mlp.*"],
         "modules": {"*": {"bits": 8, "group_size": None}, "mlp.up_proj": {"bits": 4}}},
        LINEARS,
    )  # fmt: skip
    assert found[f"{AT}0.self_attn.o_proj"] is None
    assert found[f"{AT}1.mlp.up_proj"] is None  # what is ignored has no settings
    assert found[f"{AT}0.mlp.up_proj"] == {"bits": 4}  # the last pattern decides
    assert found[f"{AT}0.self_attn.q_proj"] == {"bits": 8}
    assert matched("ignore", "proj", ["a.proj", "a.up_proj"]) == ["a.proj"]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ({"ignore": ["dwn_proj"]}, ("'dwn_proj' names no linear", "Did you mean 'down_proj'?")),
        ({"ignore": ["lm_head"]}, ("lm_head stays in 16 bits in this format as it is",)),
        ({"method": "gguf", "ignore": ["lm_head"]}, ("lm_head is its embeddings (tied); name model.embed_tokens",)),
        ({"name": "mine", "ignore": ["*"]}, ("output 'mine': ignore: names every linear",)),
        ({"ignore": ["q_proj"]}, ("self_attn.q_proj stays in 16 bits and", "self_attn.k_proj is stored as the rest")),
        ({"method": "gptq", "rounding": None, "modules": {f"{AT}1.mlp.up_proj": {"group_size": 64}}},
         (f"{AT}1.mlp.gate_proj is stored as the rest and {AT}1.mlp.up_proj has group_size 64", "vLLM")),
        ({"method": "gptq", "rounding": None, "modules": {"*": {"group_size": 64}, "lm_hed": {"bits": 8}}},
         ("modules: 'lm_hed' names no linear",)),
        ({"method": "gguf", "rounding": None, "modules": {"q_proj": {"type": "Q4_K"}}},
         ("128 weights", "blocks of 256")),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_before_any_work(
    output: dict[str, Any], said: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    given = {key: value for key, value in output.items() if value is not None}
    if "method" in given:
        with pytest.raises(QtoolError) as refused:
            qtool.convert(tiny, [given], folder=tmp_path)
    else:
        with pytest.raises(QtoolError) as refused:
            convert_one(tiny, given, tmp_path)
    assert all(part in refused.value.message for part in said), refused.value.message
    assert refused.value.exit_code == 2
    assert not any(tmp_path.iterdir())


def test_a_recipe_says_what_is_wrong_with_its_modules() -> None:
    for output, said in (
        ({"method": "gptq", "modules": {"down_proj": {"groupsize": 32}}}, "outputs[0].modules.down_proj.groupsize"),
        ({"method": "gptq", "modules": {"down_proj": {"group_size": 33}}}, "outputs[0].modules.down_proj.group_size"),
        ({"method": "awq", "modules": {"down_proj": {"group_size": 32}}}, "outputs[0].modules"),
        ({"method": "nf4", "ignore": "down_proj"}, "outputs[0].ignore"),
    ):
        with pytest.raises(QtoolError) as refused:
            checked_recipe({"model": "m", "outputs": [output]}, "r.yaml")
        assert said in refused.value.message


def test_every_container_says_it_in_the_words_of_its_readers(made: dict[str, Artifact]) -> None:
    awq, nf4, ct, gptq = (made[name].quantization for name in ("awq", "nf4", "ct", "gptq"))
    assert f"{AT}0.mlp.down_proj" in awq["modules_to_not_convert"]
    assert f"{AT}0.self_attn.qkv_proj" in awq["modules_to_not_convert"]
    assert f"{AT}1.self_attn.v_proj" in nf4["llm_int8_skip_modules"]
    assert ct["ignore"] == ["lm_head", f"{AT}0.self_attn.o_proj", f"{AT}1.self_attn.o_proj"]
    groups = {key: (group["targets"], group["weights"]["num_bits"], group["weights"]["group_size"])
              for key, group in ct["config_groups"].items()}  # fmt: skip
    up = [f"{AT}{layer}.mlp.{kind}_proj" for layer in (0, 1) for kind in ("gate", "up")]
    assert groups["group_0"] == (["Linear"], 4, 64)
    assert groups["group_1"] == (up, 4, 32)
    assert groups["group_2"] == ([f"{AT}0.mlp.down_proj", f"{AT}1.mlp.down_proj"], 8, 64)
    assert gptq["dynamic"][r"-:^model\.layers\.0\.mlp\.gate_up_proj$"] == {}  # what vLLM calls gate and up
    assert gptq["dynamic"][r"+:^model\.layers\.1\.mlp\.down_proj$"] == {"bits": 8, "group_size": 32}
    (kept,) = gptq["modules_in_block_to_quantize"]  # optimum asks for lists in a list
    assert kept == [name for name in LINEARS if not name.startswith(f"{AT}0.mlp")]
    beside = json.loads((made["gptq"].path / "quantize_config.json").read_text())
    assert beside == gptq


def test_what_is_ignored_is_the_source_bit_for_bit(made: dict[str, Artifact], tiny: Path) -> None:
    source = Checkpoint.open(tiny)
    for name, linear, dtype in (
        ("nf4", f"{AT}0.self_attn.v_proj", torch.bfloat16),
        ("gptq", f"{AT}0.mlp.down_proj", torch.float16),
        ("ct", f"{AT}1.self_attn.o_proj", torch.float16),
    ):
        stored = made[name].checkpoint.tensor(f"{linear}.weight")
        assert stored.dtype == dtype
        assert torch.equal(stored, source.tensor(f"{linear}.weight").to(dtype))
        assert linear not in made[name].linears()
    file = made["gguf"].file
    assert {file.layout[f"blk.{layer}.attn_output.weight"][0] for layer in (0, 1)} == {"BF16"}
    assert file.layout["blk.0.attn_v.weight"][0] == "Q5_0"
    assert file.layout["blk.0.attn_q.weight"][0] == "Q8_0"
    assert file.layout["token_embd.weight"][0] == "F16"
    back = made["gguf"].codes(f"{AT}1.self_attn.o_proj").dequantize()
    assert torch.equal(back, source.tensor(f"{AT}1.self_attn.o_proj.weight").float())


def test_a_linear_of_its_own_settings_is_as_in_an_output_of_those_settings(made: dict[str, Artifact]) -> None:
    """Without error propagation no linear depends on another one."""
    for linear in made["mixed"].linears():
        other = made["all-32" if linear.endswith("down_proj") else "all-64"]
        assert made["mixed"].codes(linear).equals(other.codes(linear)), linear
    assert len(made["mixed"].linears()) == len(LINEARS) - 4


@pytest.mark.parametrize("name", ["awq", "gptq", "folded", "ct", "nf4", "gguf", "mixed"])
def test_verify_finds_it_sound_against_its_source(name: str, made: dict[str, Artifact], tiny: Path) -> None:
    """Linears in 16 bits took the scales that were folded: their own and their producers'."""
    looked = qtool.verify(made[name].path, tiny)
    assert [f"{one.name}: {one.detail}" for one in looked.checks if one.required and one.status == "fail"] == []
    assert any(one.name == "error against the source" and one.status == "pass" for one in looked.checks)


def test_what_makes_all_linears_alike_is_not_said_to_load_other_sizes(made: dict[str, Artifact]) -> None:
    """The plan's word and the check's are one; linears in 16 bits alone are no other size."""
    for name, loads in (("gptq", False), ("mixed", False), ("folded", True), ("all-64", True)):
        said = what_loads_it(qtool.verify(made[name].path).checks)
        assert ("not in transformers + GPTQModel 7.6 (it makes all linears of one size" in said) is not loads, said
        assert ("transformers + GPTQModel" in said.split("not in")[0]) is loads, said


def test_folded_scales_change_nothing_but_the_rounding(made: dict[str, Artifact], tiny: Path) -> None:
    """The model with every quantized linear put back to the source's, scaled: the source's answers."""
    from transformers import AutoConfig

    source, artifact = Checkpoint.open(tiny), made["folded"]
    kept = Checkpoint.open(artifact.path / "qtool")
    state = {}
    for name, tensor in artifact.read():
        linear = name.removesuffix(".weight")
        if linear in artifact.linears():
            columns, rows = (kept.tensor(f"{linear}.{axis}") for axis in ("columns", "rows"))
            tensor = source.tensor(name).float() * columns / rows[:, None]
        state[name] = tensor.float()
    tokens = torch.arange(4, 60)[None]
    config = AutoConfig.from_pretrained(tiny)
    folded, plain = (load_model(one, config, torch.device("cpu")).float() for one in (state.items(), source.read()))
    with torch.inference_mode():
        difference = folded(tokens).logits - plain(tokens).logits
    assert any(bool((kept.tensor(f"{name}.columns") != 1).any()) for name in LINEARS)
    assert float(difference.abs().max()) < 0.05 * float(plain(tokens).logits.detach().std())


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "awq",
            {"modules_to_not_convert": ["lm_head"]},
            "stays in 16 bits, and quantization_config does not say",
        ),
        ("nf4", {"llm_int8_skip_modules": ["lm_head"]}, "stays in 16 bits, and quantization_config does not say so"),
        ("ct", {"ignore": ["lm_head"]}, "self_attn.o_proj stays in 16 bits"),
        ("gptq", {"dynamic": {r"-:.*down_proj": {}}}, "quantize_config.json and config.json disagree on dynamic"),
        ("gptq", {"dynamic": {r"+:.*down_proj": {}}}, "dynamic holds a pattern"),
        ("gptq", {"dynamic": {}}, "mlp.down_proj"),
    ],
)
def test_a_section_that_does_not_say_it_is_found(
    name: str, change: dict[str, Any], said: str, made: dict[str, Artifact], tmp_path: Path
) -> None:
    folder = shutil.copytree(made[name].path, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    looked = qtool.verify(folder)
    found = " ".join(one.detail for one in looked.checks if one.required and one.status == "fail")
    assert said in found


@pytest.mark.parametrize("name", ["ct", "nf4"])
def test_transformers_loads_it(name: str, made: dict[str, Artifact]) -> None:
    from transformers import AutoModelForCausalLM

    if name == "ct":
        pytest.importorskip("compressed_tensors")
    artifact, tokens = made[name], torch.arange(4, 60)[None]
    model = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32).eval()
    ours = load_model(artifact.read(), model.config, torch.device("cpu")).float()
    with torch.inference_mode():
        found, expected = model(tokens, use_cache=False).logits, ours(tokens).logits
    # bitsandbytes computes in bfloat16, as the file says
    assert float((found - expected).abs().mean()) < (1e-3 if name == "ct" else 2e-2) * float(expected.std())


def test_llama_cpp_loads_it(made: dict[str, Artifact], tiny: Path) -> None:
    """What it computes is near to qtool's reading (it rounds inputs to eight bits), and far from one in which the two
    layers have each other's v_proj."""
    from transformers import AutoConfig

    artifact, ids = made["gguf"], list(range(4, 44))
    assert artifact.gguf is not None
    right, config = dict(artifact.read()), AutoConfig.from_pretrained(tiny)
    names = [f"{AT}{layer}.self_attn.v_proj.weight" for layer in (0, 1)]
    wrong = right | {names[0]: right[names[1]], names[1]: right[names[0]]}
    with llama_cpp.serve(artifact.gguf, 64) as url:
        best = served.top_logprobs(url, ids, config.vocab_size)
    found = torch.tensor([best[token] for token in range(config.vocab_size)])
    divergences = []
    for state in (right, wrong):
        model = load_model(iter(state.items()), config, torch.device("cpu"))
        with torch.inference_mode():
            row = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        divergences.append(float((row.exp() * (row - found)).sum()))
    assert divergences[0] < 0.03 < 10 * divergences[0] < divergences[1]


def test_vllm_joins_siblings() -> None:
    assert vllm.joined(f"{AT}3.self_attn.k_proj") == f"{AT}3.self_attn.qkv_proj"
    assert vllm.joined(f"{AT}3.mlp.shared_expert.up_proj") == f"{AT}3.mlp.shared_expert.gate_up_proj"
    assert vllm.joined(f"{AT}3.mlp.experts.7.up_proj") == f"{AT}3.mlp.experts"
    assert vllm.joined(f"{AT}3.mlp.down_proj") is None


def test_a_dynamic_rule_is_one_name_or_refused() -> None:
    section = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {r"+:^a\.b$": {"bits": 8}}}
    assert changed(section, "a.b")["bits"] == 8
    assert changed(section, "axb")["bits"] == 4
    assert left_out({"dynamic": {r"-:^a\.b$": {}, "-:.*mlp": {}}}) == ["a.b", "re:.*mlp"]
    with pytest.raises(QtoolError, match="holds a pattern"):
        container_of(section).own(section | {"dynamic": {"+:.*": {"bits": 8}}}, "a.b")
