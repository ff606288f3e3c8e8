"""Hugging Face tensors as llama.cpp wants them: names through the gguf package's map, and the rows of q and k in the
order that llama's interleaved rotation expects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.formats.gguf.ggml import load_gguf
from qtool.convert.models.model_config import completed, gguf_architecture, is_tied

PERMUTED = ("llama",)
ADDED_ONE = ("gemma", "gemma2", "gemma3")  # their norms apply 1 + weight, and llama.cpp's files hold the sum
SUFFIXES = (".weight", ".bias")
PARTS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm",
)  # fmt: skip
ROPE_FREQS = "rope_freqs.weight"


def gguf_names(tensors: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """HF name -> GGUF name, a tied head left out. Raises QtoolError for a tensor that llama.cpp does not know."""
    table = _name_map(config)
    tied = is_tied(config)
    found = {}
    for name in tensors:
        if tied and name == "lm_head.weight":
            continue
        mapped = table.get_name(name, try_suffixes=SUFFIXES)
        if mapped is None:
            raise QtoolError(f"{name}: llama.cpp has no tensor for it in architecture {gguf_architecture(config)}.")
        found[name] = mapped
    return found


def possible_names(config: Mapping[str, Any]) -> dict[str, str]:
    """HF name -> GGUF name of every tensor that a model of this config may have."""
    table = _name_map(config)
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    modules += [f"model.layers.{index}.{part}" for index in range(int(config["num_hidden_layers"])) for part in PARTS]
    names = [module + suffix for module in modules for suffix in SUFFIXES]
    mapped = {name: table.get_name(name, try_suffixes=SUFFIXES) for name in names}
    return {name: found for name, found in mapped.items() if found is not None}


def _name_map(config: Mapping[str, Any]) -> Any:
    gguf = load_gguf()
    architecture = getattr(gguf.MODEL_ARCH, gguf_architecture(config).upper())
    return gguf.get_tensor_name_map(architecture, int(config["num_hidden_layers"]))


def row_order(name: str, rows: int, config: Mapping[str, Any]) -> torch.Tensor | None:
    """For a GGUF tensor whose rows are reordered: source row of each stored row, int64 ``[rows]``; None for others.

    HF rotates halves of a head, llama.cpp's arch llama neighbouring pairs: head rows (2, dim / 2) become (dim / 2, 2).
    """
    if gguf_architecture(config) not in PERMUTED:
        return None
    heads = int(config["num_attention_heads"])
    if ".attn_k." in name:
        heads = int(completed(config)["num_key_value_heads"])
    elif ".attn_q." not in name:
        return None
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()


def norm_offset(name: str, config: Mapping[str, Any]) -> float:
    """What llama.cpp's file has on top of a GGUF tensor's weight in the checkpoint."""
    return 1.0 if name.endswith("norm.weight") and gguf_architecture(config) in ADDED_ONE else 0.0
