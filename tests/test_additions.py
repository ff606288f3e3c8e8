"""A new method is a module and a row, and so is a new container: both are added here, and a recipe is run with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from qtool.convert.files.checkpoint import Checkpoint

CONTAINER = '''
"""int8: ``weight_int8`` as stored, ``weight_step`` float32 a row."""
import torch
from qtool.convert.formats.codes import UniformCodes

MARK, SUFFIXES, POSITIVE, NONZERO = "weight_int8", ("weight_int8", "weight_step"), ("weight_step",), ()
BY_ROW, EXPANDS, COPIES, KEYS = True, False, (), frozenset({"quant_method"})

def skipped(section): return []
def geometry(section): return {"bits": 8, "group_size": -1}
def multiples(section): return 1, 1
def specs(out, columns, section, dtype):
    return {"weight_int8": (torch.uint8, (out, columns)), "weight_step": (torch.float32, (out, 1))}
def pack(codes, section): return {"weight_int8": codes.codes, "weight_step": codes.scale}
def unpack(tensors, section):
    values, step = tensors["weight_int8"], tensors["weight_step"]
    return UniformCodes(values, step, torch.full(step.shape, 128, dtype=torch.uint8), 8, values.shape[1])
def shape(tensor, section): return tuple(tensor("weight_int8").shape)
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
import container, method  # the two modules
from qtool.convert.formats.containers import CONTAINERS
from qtool.quantize.methods.table import METHODS

CONTAINERS["int8"] = container
METHODS["int8"] = method.Int8Method
from qtool.cli import main

main()
"""


def test_a_method_and_a_container_are_two_modules_and_two_rows(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """`qtool run`, `verify` and `plan` know them at once, beside a method that walks with a stream of its own."""
    for name, text in (("container", CONTAINER), ("method", METHOD), ("rows", ROWS)):
        (tmp_path / f"{name}.py").write_text(text)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny}\ncalibration: {{text: {text_file}, samples: 4, length: 32}}\n"
        f"outputs: [{{method: int8}}, {{method: awq, group_size: 32}}]\noutput_dir: {tmp_path}/artifacts\n"
    )

    def qtool(*arguments: str) -> str:
        command = [sys.executable, str(tmp_path / "rows.py"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    qtool("run", str(recipe), "--device", "cpu")
    made, source = Checkpoint.open(tmp_path / "artifacts" / "tiny-int8"), Checkpoint.open(tiny)
    name = "model.layers.1.mlp.down_proj"
    weight = (made.tensor(f"{name}.weight_int8").float() - 128) * made.tensor(f"{name}.weight_step")
    expected = source.tensor(f"{name}.weight").float()
    assert float((weight - expected).norm() / expected.norm()) < 0.01
    assert torch.equal(made.tensor("model.norm.weight"), source.tensor("model.norm.weight"))
    assert "NOT sound" not in qtool("verify", str(made.path), "--source", str(tiny))
    assert "int8" in qtool("plan", str(tiny), "--format", "int8")
