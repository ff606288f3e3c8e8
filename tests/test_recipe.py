"""Recipes: all faults in one message with their paths; shipped recipes are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool import QtoolError
from qtool.recipe.sections import load_recipe

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
        "outputs[1].groupsize: unknown key", "gates[0]:", "exactly one of", "5 errors",
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


def test_a_list_is_not_called_short_for_a_value_that_is_wrong_itself(tmp_path: Path) -> None:
    """pydantic counts what is left; an empty list is short."""
    for text, said in (("[511]", ".lengths[0]: Input should be greater"), ("[]", ".lengths: Tuple should have at")):
        asked = f"evaluate: {{tasks: [{{task: long-call, made: {{lengths: {text}}}}}]}}"
        with pytest.raises(QtoolError) as error:
            load_recipe(write(tmp_path, f"{BASE}{asked}"))
        assert f"evaluate.tasks[0].made{said}" in error.value.message
        assert "errors in the recipe" not in error.value.message


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


BASE = "model: x/y\noutputs: [{method: nf4}]\n"
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: x\n" + BASE, "modle: unknown key; did you mean 'model'? The keys here are model, calibration"),
        (BASE + "evaluate: {task: x}", "evaluate.task: unknown key; did you mean 'tasks'?"),
        (BASE + "evaluate: {tasks: [{task: x, limits: 3}]}", "evaluate.tasks[0].limits: unknown key; did you mean"),
        (BASE + "group_size: 32", "group_size: unknown key; it belongs under `outputs:` with method awq"),
        (BASE + "zzz: 32", "zzz: unknown key; the keys here are model, calibration"),
        ("model: x\noutputs: [{method: awk}]", "outputs[0]: 'awk' is no such method; did you mean 'awq'?"),
        ("model: x\noutputs: [{method: awq, bits: 3}]", "outputs[0].bits: 3 is not possible; it is 4"),
        ("model: x\noutputs: [{method: gptq, bits: 3}]", "outputs[0].bits: 3 is not possible; it is one of 4, 8"),
        ("model: x\noutputs: [{method: gguf, type: q4k}]", "did you mean 'Q4_K"),
        (BASE + "evaluate: {engine: vlm, tasks: [{task: heldout}]}", "evaluate.engine: 'vlm' is not possible; did"),
        (BASE + "calibration: qtool-code", "calibration: is text; it has to be keys of text, split"),
        ("model: x\noutputs: awq", "outputs: is text; it has to be a list"),
        ("model: x\noutputs: [{method: awq, group_size: '32'}]", "'32' is text; write 32 without quotes"),
        ("model: x\noutputs: [{method: gptq, bits: '4'}]", "outputs[0].bits: '4' is text; write 4 without quotes"),
        ("model: x\noutputs: [null]", "outputs[0]: is empty; it has to be keys with values"),
        ("model: x\noutputs: [{method: awq, name: " + "a" * 101 + "}]", "at most 100 characters"),
        ("model: x\noutputs: [{method: awq, propagate_strength: true}]", "a number is needed (got True)"),
        (BASE + "calibration: {text: x, samples: yes}", "calibration.samples: True is no whole number"),
        (BASE + "calibration: {text: x, length: 64.0}", "calibration.length: 64.0 is no whole number"),
        (BASE + "gates: [{max_kld: true}]", "gates[0].max_kld: a number is needed (got True)"),
        (BASE + "publish: {to: x, benchmarks: {m: {dataset: a/b, tsk: y}}}", "publish.benchmarks.m.tsk: unknown key"),
        (BASE + "evaluate: {tasks: [{task: x, after: 2025-02-30}]}", ":3: not valid YAML: '2025-02-30': day is out"),
        (BASE + "evaluate: {timeout: .inf}", "evaluate.timeout: Input should be a finite number"),
        (BASE + "evaluate: {timeout: 5000000}", "evaluate.timeout: Input should be less than or equal to 3600"),
        (BASE + "evaluate: {temperature: 1.0e-300}", "`temperature:` below 0.001"),
        (BASE + "gates: [{max_kld: .nan}]", "gates[0].max_kld: Input should be a finite"),
        (BASE + "calibration: {text: x, seed: 1" + "0" * 30 + "}", "calibration.seed:"),
        (BASE + "calibration: {text: x, samples: 1" + "0" * 5000 + "}", ":3: not valid YAML"),
        (BASE + "output_dir: " + "a" * 5000, "output_dir:"),
        (BASE + "output_dir: /tmp/" + "a" * 300, "output_dir: a folder's name has 300 characters"),
        (BASE + "model: z\n", ":3: key 'model' stands there twice (line 1)"),
        (BASE + "gates: [{max_kld: 1, max_kld: 2}]", ":3: key 'max_kld' stands there twice (line 3)"),
        (BASE + "---\n" + BASE, ":3: not valid YAML: it holds several documents"),
        (BASE + "\tgates: []", ":3: not valid YAML: .*not tabs"),
        (BASE + "x: &m {a: *m}", "refers to what it is a part of"),
        (BASE + "? [a]\n: 1", "a key that is a seq"),
        (BASE + "1: x", "no text"),
        (BOMB + BASE, "more than 10,000 values"),
        ("[" * 5000, "nested too deeply"),
        ("x: " + "{a: " * 100 + "1" + "}" * 100, "nested too deeply"),
        ("", "it is empty"),
        ("# only a comment", "it is empty"),
        ("text", "it is one value"),
        (" " * 2 * 10**6, "qtool reads at most"),
        ('model: "a\\0b"\noutputs: [{method: nf4}]', "null character"),
        ('model: "\\ud800"\noutputs: [{method: nf4}]', "half of a character"),
    ],
)
def test_more_faults(tmp_path: Path, text: str, expected: str) -> None:
    import re

    with pytest.raises(QtoolError) as error:
        load_recipe(write(tmp_path, text))
    assert expected in error.value.message or re.search(expected, error.value.message), error.value.message
    assert error.value.exit_code == 2


def test_files_that_are_no_text(tmp_path: Path) -> None:
    import os

    path = tmp_path / "r.yaml"
    path.write_bytes(b"# caf\xe9\n" + BASE.encode())
    with pytest.raises(QtoolError, match=r"not UTF-8 .*Latin-1"):
        load_recipe(path)
    path.write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_recipe(path).model.id == "x/y"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(QtoolError, match="is a pipe"):
        load_recipe(path)
    with pytest.raises(QtoolError, match="is a folder"):
        load_recipe(tmp_path)


def test_any_case_and_anchors(tmp_path: Path) -> None:
    text = "model: x/y\noutputs:\n  - &a {method: GGUF, type: q4_k_m}\n  - {<<: *a, name: b, type: Bf16}\n"
    text += "evaluate: {engine: VLLM, tasks: [{task: heldout}]}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert [getattr(output, "type", None) for output in recipe.outputs] == ["Q4_K_M", "BF16"]
    assert recipe.evaluate.engine == "vllm"
    plain = text.replace("GGUF", "gguf").replace("q4_k_m", "Q4_K_M").replace("Bf16", "BF16").replace("VLLM", "vllm")
    assert load_recipe(write(tmp_path, plain)).digest == recipe.digest


def test_relative_names_are_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtool.recipe.paths import require_paths

    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    (work / "here").mkdir(parents=True)
    (elsewhere / "near").mkdir(parents=True)
    (elsewhere / "text.md").write_text("x")
    monkeypatch.chdir(work)
    for text, said in (
        ("model: ./near\noutputs: [{method: nf4}]", r"`model` './near' is relative.*Write '../elsewhere/near'"),
        ("model: ./none\noutputs: [{method: nf4}]", r"'./none' is relative.*work/none.*elsewhere/none.*no Hub id"),
        (BASE + "calibration: {text: text.md}", r"`calibration.text` 'text.md' is relative.*'../elsewhere/text.md'"),
        (BASE + "evaluate: {tasks: [{task: text.md}]}", "`evaluate.tasks` 'text.md' is relative"),
        ("model: x/y\noutputs: [{method: gguf, imatrix: text.md}]", "`imatrix` 'text.md' is relative"),
    ):
        path = write(elsewhere, text)
        with pytest.raises(QtoolError, match=said):
            require_paths(load_recipe(path), path)
    for text in (BASE, BASE.replace("x/y", "here"), BASE.replace("x/y", str(elsewhere / "near"))):
        path = write(elsewhere, text)
        require_paths(load_recipe(path), path)
