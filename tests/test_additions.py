"""A new method is a module and a row, and so is a new container: both are added here, and a recipe is run with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtool.convert.files.checkpoint import Checkpoint

CONTAINER = '''
"""int8: ``weight_int8`` as stored, ``weight_step`` float32 a row."""
import torch
from qtool.convert.formats.codes import UniformCodes
from qtool.convert.runtimes.rule import Runtime, RuntimeRule, nothing_observed as observed

SAFETENSORS = True
RUNS_IN = (Runtime("transformers", "transformers", "int8-kernels", "pip install int8-kernels"),)
MARK, SUFFIXES, POSITIVE = "weight_int8", ("weight_int8", "weight_step"), ("weight_step",)
NONZERO: tuple[str, ...] = ()
BY_ROW, EXPANDS, COPIES, KEYS = True, False, (), frozenset({"quant_method"})

def skipped(section): return []
def own(section, linear): return section
def geometry(section): return {"bits": 8, "group_size": -1}
def multiples(section): return 1, 1
def specs(out, columns, section, dtype):
    return {"weight_int8": (torch.uint8, (out, columns)), "weight_step": (torch.float32, (out, 1))}
def pack(codes, section): return {"weight_int8": codes.codes, "weight_step": codes.scale}
def unpack(tensors, section):
    values, step = tensors["weight_int8"], tensors["weight_step"]
    return UniformCodes(values, step, torch.full(step.shape, 128, dtype=torch.uint8), 8, values.shape[1])
def shape(sizes, tensor, section): return tuple(sizes("weight_int8"))
def stores(made): return made["method"] == "int8"
def section_of(made): return {"quant_method": "int8"}
def _bytes(subject, cards):
    if cards > 1: yield "one card alone"
RULES = (RuntimeRule("bytes", "int8-kernels", "1.0", "int8/kernel.py", _bytes, tensor_parallel=True),)
'''
METHOD = '''
"""Eight bits, the largest weight of a row at 127."""
from typing import Literal
import torch
from qtool.convert.formats.codes import UniformCodes
from qtool.convert.formats.shards import Shards
from qtool.quantize.methods.method import LayerCodes, Method, Name, Needs

class Int8Method(Method):
    short = {"int8": {}}
    method: Literal["int8"]
    name: Name = "int8"

    @property
    def needs(self): return Needs.NOTHING
    @property
    def container(self): return Shards({"quant_method": "int8"}, None, -1)
    def quantize(self, layer, inputs):
        made = LayerCodes(tensors=layer.others)
        for matrix in layer.matrices:
            weight = layer.source(matrix).float()
            step = weight.abs().amax(1, keepdim=True) / 127
            codes, zero = (weight / step).round() + 128, torch.full(step.shape, 128, dtype=torch.uint8)
            made.codes[matrix.module] = UniformCodes(codes.to(torch.uint8), step, zero, 8, weight.shape[1])
            error = made.codes[matrix.module].dequantize() - weight
            made.records[matrix.module] = {"frobenius": float(error.norm() / weight.norm())}
        return made
'''
ROWS = """
import json, sys
import container, method  # the two modules
from qtool.convert.formats.table import FORMATS
from qtool.quantize.methods.table import METHODS

FORMATS["int8"] = container
METHODS["int8"] = method.Int8Method
from click.testing import CliRunner
from qtool.cli import main

results = [CliRunner().invoke(main, words) for words in json.loads(sys.argv[1])]  # what qtool imports, it imports once
json.dump([(result.exit_code, result.output) for result in results], sys.stdout)
"""


@pytest.mark.slow
def test_a_method_and_a_container_are_two_modules_and_two_rows(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """`qtool run`, `verify` and `plan` know them at once, beside a method that walks with a stream of its own."""
    for name, text in (("container", CONTAINER), ("method", METHOD), ("rows", ROWS)):
        (tmp_path / f"{name}.py").write_text(text)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny}\ncalibration: {{text: {text_file}, samples: 4, length: 32}}\n"
        f"outputs: [{{method: int8}}, {{method: awq, group_size: 32}}]\noutput_dir: {tmp_path}/artifacts\n"
    )

    artifact = tmp_path / "artifacts" / "tiny-int8"
    words = [
        ["run", recipe, "--device", "cpu"],
        ["verify", artifact, "--source", tiny],
        ["plan", tiny, "--format", "int8", "--gpu", "RTX4090", "--json"],
    ]
    command = [sys.executable, str(tmp_path / "rows.py"), json.dumps(words, default=str)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    assert [code for code, _ in results] == [0, 0, 0], results
    made, source = Checkpoint.open(artifact), Checkpoint.open(tiny)
    name = "model.layers.1.mlp.down_proj"
    weight = (made.tensor(f"{name}.weight_int8").float() - 128) * made.tensor(f"{name}.weight_step")
    expected = source.tensor(f"{name}.weight").float()
    assert float((weight - expected).norm() / expected.norm()) < 0.01
    assert torch.equal(made.tensor("model.norm.weight"), source.tensor("model.norm.weight"))
    said, planned = results[1][1], json.loads(results[2][1])
    assert "NOT sound" not in said
    assert "loads in int8-kernels 1.0, on 1 card; does not split over 2, 4 or 8" in said
    assert {(answer["format"], answer["engine"]) for answer in planned["answers"]} == {("int8", "transformers")}
