"""Artifacts whose codes are the nearest ones: sealed like any other, made without a calibration text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.convert.files.source import resolve
from qtool.convert.formats.codes import UniformCodes
from qtool.make.job import Job, open_job
from qtool.make.outputs import CalibrationSet
from qtool.make.writer import OutputWriter
from qtool.quantize import grid as grids
from qtool.quantize.methods.method import LayerCodes, unquantized
from qtool.quantize.methods.on_grid import GridMethod
from qtool.quantize.walk import LayerResult
from qtool.recipe.sections import load_recipe


def nearest(weight: Tensor, spec: grids.GridSpec) -> UniformCodes:
    """``weight [out, in]`` on the grid that covers each group's range."""
    spec = spec.for_columns(weight.shape[1])
    grid = grids.fit_minmax(weight.float(), spec)
    return grids.to_codes(grids.quantize(weight.float(), grid, spec), grid, spec)


def rounded(model: Path, outputs: list[dict[str, Any]], folder: Path) -> dict[str, Path]:
    """Output name -> its sealed artifact in ``folder``."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"model": str(model), "outputs": outputs, "output_dir": f"{folder}/artifacts"}))
    recipe = load_recipe(path)
    job = open_job(recipe, resolve(recipe.model.id), torch.device("cpu"), recipe.outputs)
    for output in job.outputs:
        method = output.method
        assert isinstance(method, GridMethod)
        writer = OutputWriter(job, output)
        for result in _layers(job, method):
            codes = result.outputs[method.name]
            writer.put_tensors(result.prefix, codes)
            for matrix, chosen in codes.codes.items():
                writer.put_matrix(result.prefix + matrix, chosen)
            writer.commit(result, codes)
        writer.seal(CalibrationSet(torch.zeros(1, 8, dtype=torch.int64), "none"))
    return {output.name: output.folder for output in job.outputs}


def _layers(job: Job, method: GridMethod) -> Iterable[LayerResult]:
    decoder, checkpoint = job.decoder, job.checkpoint
    outside = {name: checkpoint.tensor(name) for name in checkpoint.tensors if decoder.layer_of(name) is None}
    yield LayerResult(None, "", {method.name: LayerCodes(tensors=outside)})
    for layer in range(decoder.shape.layers):
        at = decoder.at(layer)
        names = [name.removeprefix(at) for name in checkpoint.tensors if name.startswith(at)]
        tensors = {name: checkpoint.tensor(at + name) for name in names}
        yield LayerResult(layer, at, {method.name: _codes(tensors, decoder.matrices(layer), method)})


def _codes(tensors: Mapping[str, Tensor], matrices: Any, method: GridMethod) -> LayerCodes:
    made = LayerCodes(tensors=unquantized(matrices, tensors))
    for matrix in matrices:
        weight = matrix.of(tensors[matrix.tensor]).float()
        codes = made.codes[matrix.module] = nearest(weight, method.spec)
        error = (codes.dequantize() - weight).norm() / weight.norm()
        made.records[matrix.module] = {"frobenius": float(error)}
        made.kept[f"{matrix.module}.columns"] = torch.ones(weight.shape[1])
        made.kept[f"{matrix.module}.rows"] = torch.ones(weight.shape[0])
    return made
