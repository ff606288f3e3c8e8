"""A rehearsal: the outputs of a recipe made of a tiny model of the same kind, so that Triton has compiled their kernels
by the time they are needed, and keeps them on disk.

    python -P -m qtool.quantize.rehearsal DONE < wanted.json     # the file DONE is made at the end

A process of its own: nothing that it does reaches the numbers of the run. The tiny model has two layers of a few
hundred channels; all on which a kernel's compiled form depends is the real one's: group sizes, types of blocks, dtypes,
what widths divide by (`reduced`). Where types are named, a survey's trials of them are rehearsed on random matrices.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import save_file
from torch import Tensor

from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.config_file import CONFIG, read_config
from qtool.convert.files.durable import working_folder
from qtool.convert.formats.plan import ModelShape
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.shape import decoder_of
from qtool.convert.skeleton import build_skeleton, load_config
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.method import Method
from qtool.quantize.methods.table import METHODS
from qtool.quantize.rounding import factorize
from qtool.quantize.survey_errors import DAMP, ROWS
from qtool.quantize.walk import Column, LayerResult, Walk

UNIT = 256  # what the widths of blocks and groups divide: what is left of a width by it stays
LEAST = 512  # channels at least, where the model has as many
LAYERS = 2  # llama.cpp's rules give the second more bits
VOCABULARY = 512
SAMPLES, LENGTH = 8, 128
PREFIX = "qtool-rehearsal-"


class Wanted(BaseModel):
    """What is to be rehearsed. config: the source's config.json; dtype: of its weights; outputs: sections of the
    recipe; widths: of an output whose types are tried, type -> widths of its matrices, reduced; no config is needed."""

    config: dict[str, Any]
    dtype: str
    outputs: list[dict[str, Any]]
    device: str
    widths: dict[str, list[int]] = {}


def reduced(config: Mapping[str, Any], shape: Geometry) -> dict[str, Any]:
    """config.json of the tiny model. Widths leave what the real ones leave when divided by `UNIT`."""
    width = reduced_width(shape.heads * shape.head_dim)
    beyond = {n: n * shape.head_dim - width for n in range(1, shape.heads + 1)}  # the real number is the last that fits
    heads = next(n for n, more in beyond.items() if more >= 0 and more % UNIT == 0)
    found = dict(config) | {
        "hidden_size": reduced_width(shape.hidden), "intermediate_size": reduced_width(shape.intermediate),
        "num_hidden_layers": LAYERS, "num_attention_heads": heads,
        "num_key_value_heads": heads if shape.kv_heads == shape.heads else 1,
        "head_dim": shape.head_dim, "vocab_size": VOCABULARY,
    }  # fmt: skip
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        found[key] = 0
    for key, value in config.items():
        if isinstance(value, list) and len(value) == shape.layers:  # one for each layer
            found[key] = value[:LAYERS]
    return found


def reduced_width(width: int) -> int:
    """A small width that leaves what ``width`` leaves."""
    return width if width < LEAST + UNIT else LEAST + width % UNIT


def walk_of(folder: Path, config: Mapping[str, Any], dtype: torch.dtype, methods: Sequence[Method],
            device: torch.device) -> Walk:  # fmt: skip
    """A walk over a random model with this config.json, which is written into ``folder``."""
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    model = build_skeleton(load_config(folder))
    generator = torch.Generator().manual_seed(0)
    tied = bool(config.get("tie_word_embeddings"))
    tensors = {}
    for name, meta in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            noise = torch.randn(meta.shape, generator=generator)
            tensors[name] = (noise * 0.02 + (meta.ndim == 1)).to(dtype)
    save_file(tensors, folder / "model.safetensors")
    checkpoint, raw = Checkpoint.open(folder), read_config(folder)
    decoder = decoder_of(raw)
    shape = ModelShape(checkpoint.tensors, decoder, raw)
    columns = [Column(method, method.container.of_model(decoder).plan(shape)) for method in methods]
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    return Walk(model, decoder, checkpoint, CalibrationSet(tokens, "rehearsal"), columns, device)


def rehearse(wanted: Wanted) -> Iterator[LayerResult]:
    """The layers of the tiny model, as every output would store them."""
    methods = [METHODS[output["method"]].model_validate(output) for output in wanted.outputs]
    config = reduced(wanted.config, decoder_of(wanted.config).shape)
    with working_folder(PREFIX) as folder:
        dtype = getattr(torch, wanted.dtype)
        walk = walk_of(Path(folder), config, dtype, methods, torch.device(wanted.device))
        yield from walk.outside()
        yield from walk.run()


def try_types(wanted: Wanted) -> Iterator[Tensor]:
    """What a survey does with every type: a stack of problems, and rows of a table."""
    device, dtype = torch.device(wanted.device), getattr(torch, wanted.dtype)
    method = METHODS[wanted.outputs[0]["method"]].model_validate(wanted.outputs[0])
    generator = torch.Generator().manual_seed(0)
    for kind, widths in wanted.widths.items():
        for width in widths:
            weight = torch.randn(2, ROWS, width, generator=generator).mul_(0.02).to(device, dtype)
            inputs = torch.randn(2, 2 * width, width, generator=generator).to(device)
            gram = inputs.mT @ inputs
            factor = factorize(gram, DAMP) if method.compensates else None
            yield method.trial(weight, kind, gram if factor else gram.diagonal(dim1=-2, dim2=-1), factor)
            yield method.trial(weight[0], kind, None, None)


if __name__ == "__main__":
    os.nice(10)
    asked = Wanted.model_validate_json(sys.stdin.read())
    for _ in try_types(asked) if asked.widths else rehearse(asked):
        pass
    Path(sys.argv[1]).touch()
