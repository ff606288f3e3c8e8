"""Hugging Face tensors as llama.cpp wants them: names through the gguf package's map, and the rows of q and k in the
order that llama's interleaved rotation expects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.formats.gguf.ggml import load_gguf
from qtool.convert.models.expert_names import stacked
from qtool.convert.models.feeds import Shape
from qtool.convert.models.model_config import is_tied
from qtool.convert.models.shape import Decoder, decoder_of
from qtool.convert.models.table import gguf_facts
from qtool.convert.models.tied import HEAD

SUFFIXES = (".weight", ".bias")
STACKED = "_exps.weight"  # how the names of tensors end that hold a matrix of every expert
SHARED_GATE = "ffn_gate_inp_shexp.weight"  # a vector here, a matrix of one row in its model
SCORE_BIAS = ".e_score_correction_bias"  # what corrects a router's choice
ROPE_FREQS = "rope_freqs.weight"


def gguf_names(tensors: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """HF name -> GGUF name, a tied head left out; all experts of a layer have one. Raises QtoolError for a tensor that
    llama.cpp does not know."""
    table = _name_map(config)
    tied = is_tied(config)
    found = {}
    for name in tensors:
        if tied and name == HEAD:
            continue
        mapped = table.get_name(_asked(name), try_suffixes=SUFFIXES)
        if mapped is None:
            architecture = gguf_facts(config).architecture
            raise QtoolError(f"{name}: llama.cpp has no tensor for it in architecture {architecture}.")
        found[name] = mapped
    return found


def possible_names(config: Mapping[str, Any]) -> dict[str, str]:
    """HF name -> GGUF name of every tensor that a model of this config may have."""
    table = _name_map(config)
    decoder = decoder_of(config)
    names = [module + suffix for module in modules(decoder) for suffix in SUFFIXES]
    names += [name for name in decoder.tensors() if name.endswith(SCORE_BIAS)]
    mapped = {name: table.get_name(_asked(name), try_suffixes=SUFFIXES) for name in names}
    return {name: found for name, found in mapped.items() if found is not None}


def modules(decoder: Decoder) -> list[str]:
    """Every module of a model that has a tensor, the head too where it is tied."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in (*decoder.tensors(), HEAD)))


def _asked(name: str) -> str:
    """As the gguf package's table has it: one name for all experts, and a bias as biases are called."""
    if name.endswith(SCORE_BIAS):
        name = name.removesuffix("_bias") + ".bias"
    return stacked(name)


def stored_shape(name: str, shape: Shape, experts: int) -> Shape:
    """The shape of the tensor ``name`` of a file, of whose HF tensor's ``shape``; of an expert's, that of the stack of
    all ``experts``."""
    if name.endswith(SHARED_GATE):
        return shape[-1:]
    return (experts, *shape) if name.endswith(STACKED) else shape


def model_shape(name: str, shape: Shape) -> Shape:
    """Inverse of `stored_shape`: of one expert."""
    if name.endswith(SHARED_GATE):
        return (1, *shape)
    return shape[1:] if name.endswith(STACKED) else shape


def piece(name: str, expert: int | None) -> str:
    """What a writer calls an expert's part of a stack; of others the tensor."""
    return name if expert is None else f"{name}[{expert}]"


def _name_map(config: Mapping[str, Any]) -> Any:
    gguf = load_gguf()
    facts = gguf_facts(config)
    wanted = facts.names or facts.architecture
    architecture = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    return gguf.get_tensor_name_map(architecture, int(config["num_hidden_layers"]))


def row_order(name: str, rows: int, decoder: Decoder) -> torch.Tensor | None:
    """For a GGUF tensor whose rows are reordered: source row of each stored row, int64 ``[rows]``; None for others.

    HF rotates halves of a head, llama.cpp's arch llama neighbouring pairs: head rows (2, dim / 2) become (dim / 2, 2).
    """
    facts, shape = decoder.family.gguf, decoder.shape
    heads = shape.heads if ".attn_q." in name else shape.kv_heads if ".attn_k." in name else None
    if facts is None or not facts.permuted or heads is None:
        return None
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()
