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
from qtool.convert.models.table import find_family, prefix_of, quantized

_INSTEAD = "llama.cpp's convert_hf_to_gguf.py and llama-quantize make a GGUF of it"
_MLA = f"its attention compresses keys and values (MLA), whose matrices no family splits yet; {_INSTEAD}"
_DELTA = f"three of four layers are gated delta nets, whose convolution and gates no feed says yet; {_INSTEAD}"
_SHORT = f"most layers are gated short convolutions, which no feed says yet; {_INSTEAD}"
_STATES = f"most layers are state spaces (Mamba 2), whose convolution and states no feed says yet; {_INSTEAD}"
_SPARSE = f"its attention compresses keys and values (MLA), and an indexer chooses among them; {_INSTEAD}"
# architecture -> what of it no family says yet, and what reads such a model meanwhile
_NOT_YET = {
    "DeepseekV2ForCausalLM": _MLA,
    "DeepseekV3ForCausalLM": _MLA,
    "DeepseekV32ForCausalLM": _SPARSE,
    "Glm4MoeLiteForCausalLM": _MLA,
    "GlmMoeDsaForCausalLM": _SPARSE,
    "KimiK25ForConditionalGeneration": _MLA,
    "KimiLinearForCausalLM": _DELTA,
    "Lfm2ForCausalLM": _SHORT,
    "Lfm2MoeForCausalLM": _SHORT,
    "Lfm2VlForConditionalGeneration": _SHORT,
    "Llama4ForConditionalGeneration": "transformers computes its experts in a way of its own, which no walk sees",
    "MistralLarge3ForCausalLM": _MLA,
    "NemotronHForCausalLM": _STATES,
    "NemotronH_Nano_VL_V2": _STATES,
    "Plamo2ForCausalLM": _STATES,
    "Qwen3NextForCausalLM": _DELTA,
    "Qwen3_5ForCausalLM": _DELTA,
    "Qwen3_5ForConditionalGeneration": _DELTA,
    "Qwen3_5MoeForCausalLM": _DELTA,
    "Qwen3_5MoeForConditionalGeneration": _DELTA,
    "GptOssForCausalLM": (
        "its experts come in MXFP4, which no other four-bit format improves on and which engines read as it is; "
        "llama.cpp's convert_hf_to_gguf.py repacks them without loss"
    ),
    "GraniteMoeForCausalLM": "its embedding, attention and residuals are multiplied by factors that no family says yet",
    "PhimoeForCausalLM": "its router compares jittered scores two at a time, which no family says yet",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

_SECTIONS = ("text_config", "vision_config", "audio_config", "thinker_config")


def why_not_yet(config: Mapping[str, Any]) -> str:
    """What of an architecture that qtool knows by name no family says yet; empty for all others."""
    names = config.get("architectures") or []
    return next((_NOT_YET[name] for name in names if isinstance(name, str) and name in _NOT_YET), "")


def refuse_architecture(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises QtoolError for an architecture that no output can be made of, saying what kind of model it is."""
    family = find_family(config)
    if family is not None:
        return
    names = config.get("architectures") or []
    said = ", ".join(map(shown, names)) or "(none named in config.json)"
    experts = next((key for key in _EXPERTS if isinstance(config.get(key), int)), None)
    inside = next((key for key in _SECTIONS if isinstance(config.get(key), dict)), None)
    if reason := why_not_yet(config):
        why = f"not quantized yet: {reason}"
    elif inside:
        why = (
            f"a model of several parts ({inside}). Save its text model alone as one of these (for Gemma 3: "
            "`Gemma3ForCausalLM.from_pretrained(folder).save_pretrained(new)`)"
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
