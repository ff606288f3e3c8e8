"""Recipes: all faults in one message with their paths; shipped recipes are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool import QtoolError
from qtool.recipe import load_recipe

ROOT = Path(__file__).parent.parent


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_every_fault_at_once_with_its_path(tmp_path: Path) -> None:
    recipe = """
model: {id: some/model, revison: main}
calibration: {text: qtool-code, samples: many}
outputs:
  - {method: awq, group_size: 100}
  - {method: awq, name: second, groupsize: 64}
gates:
  - {max_kld: 0.1, max_drop: 3}
"""
    with pytest.raises(QtoolError) as error:
        load_recipe(write(tmp_path, recipe))
    message = error.value.message
    assert error.value.exit_code == 2
    for expected in (
        "model.revison: unknown key", "calibration.samples:", "outputs[0].group_size:",
        "outputs[1].groupsize: unknown key", "gates[0]:", "exactly one of", "5 error(s)",
    ):  # fmt: skip
        assert expected in message, message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a list", "a recipe is a mapping"),
        ("model: [unclosed", "not valid YAML"),
        ("model: x/y\noutputs: []", "`outputs:` is empty"),
        ("model: x/y\noutputs: [{method: awq}, {method: awq}]", "two outputs are named 'awq'"),
        ("model: x/y\noutputs: [{method: awq, name: a.partial}]", "an output is named 'a.partial'"),
        (
            "model: x/y\noutputs: [{method: gguff}]",
            "outputs[0]: 'gguff' is no such method; did you mean 'gguf'? It is one of awq, gptq, nf4, gguf",
        ),
        ("model: x/y\noutputs: [{bits: 4}]", "outputs[0]"),
        (
            "model: x/y\noutputs: [{method: gptq, group_size: 100, zero_point: true}]",
            "outputs[0].zero_point: unknown key",
        ),
        ("model: x/y\noutputs: [{method: awq}]\ngates: [{output: b, max_kld: 1}]", "a gate names output 'b'"),
        ("model: x/y\noutputs: [{method: awq}]\ngates: [{task: b, max_drop: 1}]", "a gate names task 'b'"),
        ("model: !!python/object/apply:os.system ['true']\noutputs: [{method: awq}]", "not valid YAML"),
    ],
)
def test_faults(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(QtoolError) as error:
        load_recipe(write(tmp_path, text))
    assert expected in error.value.message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match="No such file"):
        load_recipe(tmp_path / "absent.yaml")


def test_gates_do_not_change_the_work(tmp_path: Path) -> None:
    base = "model: x/y\noutputs: [{method: awq}]\n"
    digest = load_recipe(write(tmp_path, base)).digest
    assert load_recipe(write(tmp_path, base + "gates: [{max_kld: 0.1}]")).digest == digest
    assert load_recipe(write(tmp_path, base + "calibration: {text: qtool-code, seed: 1}")).digest != digest


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert load_recipe(path).outputs
