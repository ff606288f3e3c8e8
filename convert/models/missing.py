"""What qtool lacks for architectures that are known by name: the fact that no family says yet, and what reads such a
model meanwhile. From their public config.json and transformers' and vLLM's code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_INSTEAD = "llama.cpp's convert_hf_to_gguf.py and llama-quantize make a GGUF of it"
_MLA = f"its attention compresses keys and values (MLA), whose matrices no family splits yet; {_INSTEAD}"
_DELTA = f"three of four layers are delta nets with a decay for every channel (KDA), which no feed says yet; {_INSTEAD}"
_SHORT = f"its mixtures of experts lie behind LFM2's convolutions, under names that no mixture says yet; {_INSTEAD}"
_STATES = f"most layers are state spaces (Mamba 2), whose convolution and states no feed says yet; {_INSTEAD}"
_SPARSE = f"its attention compresses keys and values (MLA), and an indexer chooses among them; {_INSTEAD}"
_LINEAR = "most layers attend linearly, with states in place of keys and values, and the others compress them (MLA)"
_STEP = (
    "its attention's output is gated per head, the number of heads differs by layer, and some layers clamp what "
    "enters down, so that no scale passes"
)
_BY_NAME = {
    "AfmoeForCausalLM": (
        "its attention's output is multiplied by a matrix of gates (gate_proj), a second consumer of attention's "
        "input, and layers rotate or not by kind"
    ),
    "BailingHybridForCausalLM": (
        "most layers are gated delta nets with short convolutions, the others compress keys and values (MLA) "
        "behind gates"
    ),
    "BailingMoeV2ForCausalLM": (
        "transformers has no class of it: q, k and v are one matrix (query_key_value), and its router chooses "
        "groups of experts first"
    ),
    "BailingMoeV2_5ForCausalLM": _LINEAR,
    "DeepseekOCRForCausalLM": (
        "its text model is DeepSeek's mixture of experts with plain attention, a kind that no family says yet, "
        "behind two towers for images"
    ),
    "DeepseekV2ForCausalLM": _MLA,
    "DeepseekV3ForCausalLM": _MLA,
    "DeepseekV32ForCausalLM": _SPARSE,
    "DeepseekV4ForCausalLM": (
        "its attention pools keys over windows among which an indexer chooses, has sinks and a grouped output "
        "matrix, and its layers read several residual streams (hyper-connections)"
    ),
    "DiffusionGemmaForBlockDiffusion": "it writes blocks of text by diffusion; qtool goes from left to right",
    "Dots3NoteForConditionalGeneration": _SPARSE,
    "Ernie4_5_VLMoeForConditionalGeneration": (
        "text and images have experts of their own, of two widths, in one layer; its text model (ERNIE 4.5 MoE) "
        "is not known either"
    ),
    "Gemma4ForConditionalGeneration": (
        "layers have heads of two sizes, some take their keys for values or another layer's keys and values, the "
        "small ones read an embedding in every layer, and the mixture stands beside a dense MLP"
    ),
    "Glm4MoeLiteForCausalLM": _MLA,
    "GlmMoeDsaForCausalLM": _SPARSE,
    "GptOssForCausalLM": (
        "its experts come in MXFP4, which no other four-bit format improves on and which engines read as it is; "
        "their biases and clamped up are said by no mixture; llama.cpp's convert_hf_to_gguf.py repacks them "
        "without loss"
    ),
    "GraniteMoeForCausalLM": "its embedding, attention and residuals are multiplied by factors that no family says yet",
    "HunYuanVLForConditionalGeneration": (
        "its text model (HunYuan, dense) has norms of q and k after a rotation by four kinds of positions "
        "(xdrope), which no family says yet"
    ),
    "InklingForConditionalGeneration": (
        "short convolutions lie on keys, values and hidden states, whose feeds no family says, and experts' "
        "scores are normalised with a shared one's"
    ),
    "KimiK25ForConditionalGeneration": _MLA,
    "KimiLinearForCausalLM": _DELTA,
    "Lfm2MoeForCausalLM": _SHORT,
    "Llama4ForConditionalGeneration": "transformers computes its experts in a way of its own, which no walk sees",
    "MiMoV2FlashForCausalLM": (
        "values are narrower than keys, and sliding layers have sinks and twice the heads of keys and values"
    ),
    "MiniMaxM3SparseForConditionalGeneration": (
        "an indexer chooses blocks of keys for its attention, and a clamped sigmoid gate stands between up and "
        "down, so that no scale passes"
    ),
    "MistralLarge3ForCausalLM": _MLA,
    "MuseGlimmerForConditionalGeneration": (
        "its attention's output is multiplied by a matrix of gates (gate_proj), a second consumer of attention's "
        "input, and its embedding has a norm of its own"
    ),
    "NemotronHForCausalLM": _STATES,
    "NemotronH_Nano_VL_V2": _STATES,
    "Phi4MMForCausalLM": (
        "adapters for speech and images lie on every matrix (base_layer, lora_A), and its own code picks them; "
        "Phi-4-mini is the text model without"
    ),
    "PhimoeForCausalLM": "its router compares jittered scores two at a time, which no family says yet",
    "Plamo2ForCausalLM": _STATES,
    "Plamo3ForCausalLM": (
        "transformers has no class of it, and its layers lie under names of their own (model.layers.layers, "
        "mixer, with q, k and v in one matrix) behind norms that add a number of their own to the weight; "
        f"{_INSTEAD}"
    ),
    "Step3p5ForCausalLM": _STEP,
    "Step3p7ForCausalLM": _STEP,
    "Step3p7ForConditionalGeneration": _STEP,
    "UnlimitedOcrForConditionalGeneration": (
        "its text model is DeepSeek's mixture of experts with plain attention, a kind that no family says yet"
    ),
}
# model_type of a text model in a larger one -> the same
_BY_TEXT = {
    "deepseek_v2": _MLA, "deepseek_v3": _MLA, "kimi_k2": _MLA, "mistral4": _MLA, "glm4_moe_lite": _MLA,
    "kimi_linear": _DELTA,
    "lfm2_moe": _SHORT, "nemotron_h": _STATES,
}  # fmt: skip


def missing_fact(config: Mapping[str, Any], text_type: str = "") -> str:
    """Of a config.json's class, or of the model_type of its text model; empty for those that are not known by name."""
    names = config.get("architectures") or []
    found = next((_BY_NAME[name] for name in names if isinstance(name, str) and name in _BY_NAME), "")
    return found or (f"its text model is {text_type}: {_BY_TEXT[text_type]}" if text_type in _BY_TEXT else "")
