"""The first recipe (`qtool init`), those that ship (`qtool recipes`) and values by path (`--set`)."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from qtool import QtoolError
from qtool.cli import main
from qtool.recipe.overrides import apply_overrides, parse_overrides, text_of
from qtool.recipe.sections import checked_recipe, load_recipe
from qtool.runs.record import load_run
from qtool.starter import formats_of, look, write_starter

IQUEST = Path(__file__).parent / "data" / "iquest"


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_init_writes_a_recipe_that_a_dry_run_takes(here: Path) -> None:
    result = call("init", "qtool-demo", "--method", "awq,Q4_K_M")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "next: qtool run recipe.yaml --dry-run"), (
        result.output
    )
    text = (here / "recipe.yaml").read_text()
    recipe = load_recipe(here / "recipe.yaml")
    assert [output.name for output in recipe.outputs] == ["awq", "Q4_K_M"]
    assert "group_size: 128" in text
    assert "2.0 million parameters" in text
    assert "0.0 GB" not in text
    planned = call("run", "recipe.yaml", "--dry-run")
    assert planned.exit_code == 0, planned.output


def test_init_replaces_no_file_and_asks_nothing_without_a_terminal(here: Path) -> None:
    result = call("init")
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "qtool init ./My-Model" in result.output
    (here / "recipe.yaml").write_text("mine\n")
    refused = call("init", "qtool-demo")
    assert (refused.exit_code, (here / "recipe.yaml").read_text()) == (2, "mine\n")
    assert "--force" in refused.output
    assert call("init", "qtool-demo", "--force").exit_code == 0
    printed = call("init", "qtool-demo", "--out", "-")
    assert yaml.safe_load(printed.output) == yaml.safe_load((here / "recipe.yaml").read_text())


@pytest.mark.slow
def test_init_asks_on_a_terminal(here: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "qtool", "init"], stdin=slave, stdout=slave, stderr=slave, cwd=here,
        env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    os.write(master, b"qtool-demo\nawq\n")
    assert process.wait(120) == 0
    os.close(slave)
    assert [output.name for output in load_recipe(here / "recipe.yaml").outputs] == ["awq"]


@pytest.mark.parametrize(
    ("card", "method", "name"), [("H100", "awq", "awq"), ("cpu", "gguf", "Q4_K_M"), ("M4-Max-128", "gguf", "Q4_K_M")]
)
def test_a_method_is_chosen_for_the_card(card: str, method: str, name: str) -> None:
    seen = look(str(IQUEST / "IQuest-Coder-V1-40B"), card)
    made = write_starter(seen, formats_of((), seen.card))
    recipe = checked_recipe(yaml.safe_load(made.text), "init")
    assert [(output.model_dump()["method"], output.name) for output in recipe.outputs] == [(method, name)]
    assert "39.8 billion parameters" in made.text
    if card == "H100":
        assert "bf16     79.59 GB, 16.00 bits a weight; does not fit" in made.text
    assert max(map(len, made.text.splitlines())) <= 100


def test_groups_divide_every_matrix_and_gemma_is_not_put_into_float16(
    model_maker: Callable[..., Path], tmp_path: Path
) -> None:
    narrow = model_maker(tmp_path / "narrow", hidden_size=96, intermediate_size=192)
    seen = look(str(narrow), "H100")
    assert "group_size: 32" in write_starter(seen, ["awq"]).text
    gemma = tmp_path / "gemma"
    gemma.mkdir()
    (gemma / "config.json").write_text(json.dumps({
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 256,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 256, "torch_dtype": "bfloat16",
        "query_pre_attn_scalar": 64, "sliding_window": 128,
    }))  # fmt: skip
    assert "dtype: bfloat16" in write_starter(look(str(gemma), "H100"), ["awq"]).text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-model"], "no such folder"),
        (["qtool-demo", "--method", "awk"], "awk: is no method"),
        (["qtool-demo", "--card", "H1000"], "--card H1000"),
    ],
)
def test_init_says_what_is_wrong_in_one_line(here: Path, arguments: list[str], said: str) -> None:
    result = call("init", *arguments)
    assert (result.exit_code, said in result.output, result.output.count("\n")) == (2, True, 1), result.output
    assert not (here / "recipe.yaml").exists()


def test_recipes_lists_what_ships_in_eighty_columns_and_prints_one(here: Path) -> None:
    listed = call("recipes")
    shipped = sorted(path.stem for path in (Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    assert [line.split()[0] for line in listed.output.split("\n\n")[0].splitlines() if line[0] != " "] == shipped
    assert max(map(len, listed.output.splitlines())) <= 80
    assert "yaml-language-server" not in listed.output
    printed = call("recipes", "awq")
    (here / "mine.yaml").write_text(printed.output)
    assert load_recipe(here / "mine.yaml").outputs[0].name == "awq"


# --- --set -----------------------------------------------------------------------------------------------------------


def changed(*typed: str, **data: object) -> object:
    apply_overrides(data, parse_overrides(typed))
    return data


def test_values_are_put_in_by_path() -> None:
    outputs = [{"method": "awq"}, {"method": "gguf", "name": "small"}]
    assert changed("outputs.1.type=Q6_K", outputs=outputs) == {"outputs": [outputs[0], {**outputs[1], "type": "Q6_K"}]}
    assert changed("outputs.small.type=Q8_0", "outputs[0].bits=4", outputs=outputs) == {
        "outputs": [{"method": "awq", "bits": 4}, {"method": "gguf", "name": "small", "type": "Q8_0"}]
    }
    assert changed("model.revision=main", model="a/b") == {"model": {"id": "a/b", "revision": "main"}}
    assert changed("gates.0.max_kld=0.1", "measure.context=[2048, 8192]") == {
        "gates": [{"max_kld": 0.1}], "measure": {"context": [2048, 8192]},
    }  # fmt: skip
    assert changed("evaluate=null", evaluate={"samples": 2}) == {"evaluate": None}
    assert changed("model=a=b", model="x") == {"model": "a=b"}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("outputs.0.groupsize=64", "outputs[0].groupsize: unknown key; did you mean 'group_size'?"),
        ("output.0.group_size=64", "output: unknown key; did you mean 'outputs'?"),
        ("outputs.0.group_size=48", "48 is not possible; it is one of 32, 64, 128"),
        ("outputs.4.group_size=64", "'4' is no entry of that list (0 to 0, 1 adds one)"),
        ("outputs.awk.group_size=64", "did you mean 'awq'?"),
        ("output_dir.name=x", "'output_dir' is one value"),
        ("outputs.0.group_size", "write PATH=VALUE"),
        ("..=1", "write PATH=VALUE"),
        ("gates=[", "--set gates:1: not valid YAML"),
        ("gates=&a [*a]", "--set gates:1: not valid YAML"),
    ],
)
def test_a_wrong_set_is_one_line_that_names_it(write_recipe: Callable[..., Path], typed: str, said: str) -> None:
    result = call("run", write_recipe(), "--set", typed, "--dry-run")
    opening, *lines = result.output.splitlines()
    assert (result.exit_code, opening, len(lines)) == (2, "opening recipe.yaml", 1), result.output
    assert said in lines[0]
    assert f"--set {typed.partition('=')[0]}" in lines[0]


def test_what_was_set_is_recorded_and_part_of_the_run(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe, runs = write_recipe(), tmp_path / "runs"
    plain = load_recipe(recipe).digest
    result = call("run", recipe, "--set", "outputs.0.group_size=64", "--set", "gates=[{max_size: 1.0}]", "--runs", runs)
    assert result.exit_code == 0, result.output
    (folder,) = (path.parent for path in runs.glob("*/lock.json"))
    assert folder.name != plain[:16]
    run = load_run(folder)
    assert run.lock.overrides == {"outputs.0.group_size": 64, "gates": [{"max_size": 1.0}]}
    assert run.recipe_text.startswith("# as written, but for --set outputs.0.group_size, gates;")
    assert load_recipe(folder / "recipe.yaml").digest == run.lock.recipe
    assert run.manifests["awq"].output["group_size"] == 64
    assert "pass  awq: max_size 1 GB" in call("check", "latest", "--runs", runs).output


def test_without_set_the_text_stays_as_it_was() -> None:
    assert text_of("# mine\nmodel: x\n", {}, None) == "# mine\nmodel: x\n"


def test_a_recipe_that_ships_runs_on_another_model(here: Path, tiny: Path) -> None:
    result = call("run", "awq", "--set", f"model={tiny}", "--set", "outputs.0.group_size=32", "--dry-run",
                  "--set", "calibration.length=64", "--set", "evaluate.text.length=128")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "tiny" in result.output


def test_plan_takes_it_too(write_recipe: Callable[..., Path]) -> None:
    assert call("plan", write_recipe(), "--set", "outputs.0.group_size=64").exit_code == 0
    result = call("plan", "qtool-demo", "--set", "a=1")
    assert (result.exit_code, "--set changes a recipe" in result.output) == (2, True)


def test_overrides_refuse_what_is_no_path() -> None:
    with pytest.raises(QtoolError, match="PATH=VALUE"):
        parse_overrides(["a." * 40 + "b=1"])
