"""What a folder or a checkpoint is that qtool cannot start from, and what would do: read off names, before any shape is
compared."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.reading import read_json, refuse_link, shown

ADAPTER = "adapter_config.json"
UNQUANTIZED = "Take the unquantized release of this model"
# the last part of a tensor's name -> who writes such
_PACKED = {
    "qweight": "AWQ or GPTQ", "qzeros": "AWQ or GPTQ", "g_idx": "GPTQ", "quant_state.bitsandbytes__nf4": "bitsandbytes",
    "quant_state.bitsandbytes__fp4": "bitsandbytes", "absmax": "bitsandbytes", "SCB": "bitsandbytes (8-bit)",
    "weight_packed": "compressed-tensors", "weight_scale": "FP8 or compressed-tensors", "weight_scale_inv": "FP8",
    "weight_scale_2": "NVFP4", "input_scale": "FP8", "gate_up_proj_blocks": "MXFP4", "down_proj_blocks": "MXFP4",
    "W_q": "HQQ", "q_weight": "EXL2", "trellis": "EXL3", "codebooks": "AQLM", "B": "Marlin", "biases_scales": "MLX",
}  # fmt: skip
_ADAPTERS = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|hada_w\d_[ab]|ia3_l)\b")
# how a wrapper's names begin, or what it puts in between -> what it is and what would do
_WRAPPERS = {
    "_orig_mod.": ("torch.compile's wrapper", "save `model._orig_mod`"),
    "module.": ("the wrapper of data-parallel training", "save `model.module`"),
    "_fsdp_wrapped_module.": ("the wrapper of FSDP", "gather and save the model inside it"),
    "base_model.model.": ("PEFT's wrapper", "`merge_and_unload()`, then save_pretrained"),
    "language_model.": ("a multimodal model, whose text part lies there", "save the text model alone"),
    "transformer.": ("another architecture or another library", "convert it to transformers' names"),
}


def why_no_model(folder: Path) -> str:
    """What a folder without a model's safetensors holds instead."""
    if (folder / ADAPTER).exists():
        return _adapter(folder)
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return (
            f"{folder}: holds only GGUF ({shown(ggufs[0])}), which is quantized already, and no safetensors. "
            f"{UNQUANTIZED}."
        )
    pickles = sorted(path for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        name = shown(folder.name)
        return (
            f"{folder}: holds only pickle weights ({shown(pickles[0].name)}), which can run code when opened, so qtool "
            'refuses them. Convert where you trust the file: `python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{name}', torch_dtype='auto')"
            f".save_pretrained('{name}-safetensors')\"`"
        )
    inner = sorted(path.parent.name for path in folder.glob("*/*.safetensors"))
    there = f" Its folder {shown(inner[0])} has some: name that one." if inner else ""
    return f"{folder}: no *.safetensors in this folder. Name a folder that holds a Hugging Face model.{there}"


def _adapter(folder: Path) -> str:
    path = folder / ADAPTER
    refuse_link(folder, path)
    said = read_json(path)
    kind, base = said.get("peft_type"), said.get("base_model_name_or_path")
    of = f" of {shown(base)}" if isinstance(base, str) and base else ""
    return (
        f"{folder}: holds an adapter ({shown(kind) if isinstance(kind, str) else 'PEFT'}){of}, not a model. Merge it "
        "first: `PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)`, then name that "
        "folder."
    )


def refuse_quantized(folder: Path, config: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Raises QtoolError for a source that is quantized already, by config.json's word or by its tensors' names, or that
    an adapter was not merged into."""
    section = config.get("quantization_config") or config.get("compression_config")
    if section:
        method = section.get("quant_method", "method not named") if isinstance(section, dict) else "method not named"
        bits = section.get("bits", section.get("w_bit")) if isinstance(section, dict) else None
        bits = f", {bits} bits" if isinstance(bits, int) else ""
        nf4 = " NF4" if isinstance(section, dict) and section.get("bnb_4bit_quant_type") == "nf4" else ""
        raise QtoolError(
            f"{folder / 'config.json'}: says quantization_config: the model is quantized already "
            f"({shown(str(method))}{nf4}{bits}). {UNQUANTIZED}; what rounding lost does not come back."
        )
    adapted = next((name for name in tensors if _ADAPTERS.search(name)), None)
    if adapted:
        raise QtoolError(
            f"{folder}: holds {adapted}: an adapter was not merged. Merge it first (PEFT: `merge_and_unload()`), then "
            "save_pretrained."
        )
    for name in tensors:
        kind = next((kind for end, kind in _PACKED.items() if name.endswith(f".{end}")), None)
        if kind:
            raise QtoolError(
                f"{folder}: holds {name}: the model is quantized already ({kind}), though config.json does not say so. "
                f"{UNQUANTIZED}."
            )


def why_missing(folder: Path, expected: str, tensors: Collection[str]) -> str:
    """What a checkpoint without a tensor that config.json implies has in its place."""
    missing = f"{folder}: config.json implies a tensor {expected}, which no shard holds."
    ends = [name for name in tensors if name.endswith(expected.removeprefix("model."))]
    for name in ends:
        for mark, (wrapper, cure) in _WRAPPERS.items():
            if mark in name:
                return f"{missing} It holds {name}: {mark} is {wrapper}. What would do: {cure}, or rename the tensors."
    if expected == "model.embed_tokens.weight" and "lm_head.weight" in tensors:
        return (
            f"{missing} It holds lm_head.weight; the two are one tensor where tie_word_embeddings is true. What would "
            "do: load the model with transformers and save_pretrained, or store it as model.embed_tokens.weight."
        )
    if expected.removeprefix("model.") in tensors:
        return (
            f"{missing} It holds {expected.removeprefix('model.')}: the base model alone, saved without its head. What "
            "would do: load it with AutoModelForCausalLM and save_pretrained."
        )
    return f"{missing} It holds {shown(ends[0])}." if ends else f"{missing} Is a shard missing?"
