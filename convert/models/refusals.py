"""Models that qtool cannot make anything of: their architecture, or sizes that are not those of their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.config_file import CONFIG
from qtool.convert.files.reading import shown
from qtool.convert.models.missing import missing_fact
from qtool.convert.models.table import find_family, prefix_of, quantized

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

_SECTIONS = ("text_config", "llm_config", "thinker_config", "vision_config", "audio_config")


def refuse_architecture(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises QtoolError for an architecture that no output can be made of, saying what kind of model it is."""
    family = find_family(config)
    if family is not None:
        return
    names = config.get("architectures") or []
    said = ", ".join(map(shown, names)) or "(none named in config.json)"
    experts = next((key for key in _EXPERTS if isinstance(config.get(key), int)), None)
    inside = next((key for key in _SECTIONS if isinstance(config.get(key), dict)), None)
    kind = config[inside].get("model_type") if inside else None
    if reason := missing_fact(config, kind if isinstance(kind, str) else ""):
        why = f"not quantized yet: {reason}"
    elif inside:
        what = f" of model_type {shown(kind)}" if isinstance(kind, str) and kind else ""
        why = (
            f"a model of several parts ({inside}), and no row of WRAPPERS (convert/files/wrappers.py) says which class "
            f"that part{what} has alone. Save its text model alone as one of these"
        )
    elif experts:
        why = (
            f"a mixture of experts ({experts}: {config[experts]}), whose tensors and feeds qtool does not know yet "
            "(docs/experts.md)"
        )
    elif any("ForCausalLM" not in name for name in names):
        why = "no causal language model under transformers' names"
    else:
        why = (
            "not known to qtool: a module in convert/models is needed, which says what feeds its matrices "
            "(docs/adding-a-family.md)"
        )
    raise QtoolError(f"{folder / 'config.json'}: architecture {said} is {why}. Known: {', '.join(quantized())}.")


def check_sizes(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Compare config.json's sizes with the headers, before a model of these sizes is built. Raises QtoolError."""
    said, prefix = config.get("num_hidden_layers"), prefix_of(config)
    layer = re.compile(re.escape(prefix) + r"(\d{1,9})\.")
    layers = {name: int(found[1]) for name in checkpoint.tensors if (found := layer.match(name))}
    if layers and isinstance(said, int):
        held = max(layers.values()) + 1
        if said > held:
            raise QtoolError(
                f"{checkpoint.path / CONFIG}: num_hidden_layers is {said}, and the shards hold {held} layers: "
                f"{prefix}{held} is missing. Weights and config.json are not of one model."
            )
        family = find_family(config)
        if family is None or not family.drafts:
            checkpoint.refuse_strangers([name for name, layer in layers.items() if layer >= said])
    embedding, gate = "model.embed_tokens.weight", f"{prefix}0.mlp.gate_proj.weight"
    for key, name, axis in (
        ("vocab_size", embedding, 0), ("hidden_size", embedding, 1), ("intermediate_size", gate, 0),
    ):  # fmt: skip
        info, said = checkpoint.tensors.get(name), config.get(key)
        if info is not None and len(info.shape) == 2 and isinstance(said, int) and info.shape[axis] != said:
            raise QtoolError(
                f"{info.file}: {name} has shape {list(info.shape)}, but config.json implies {key} {said}. Weights "
                "and config.json are not of one model."
            )
