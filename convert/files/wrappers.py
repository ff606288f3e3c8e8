"""Models of text and images whose text model is one that qtool knows: read as that model, the rest left out by name.

An output is a text model of its own, under the names and with the config.json that every runtime has for it; images
need the source. A vision tower is not quantized and not carried along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Text = Mapping[str, Any]


def _nothing_more(_: Text) -> dict[str, Any]:
    return {}


def _whole_heads(text: Text) -> dict[str, Any]:
    """Of GLM-4.1V, whose code looks at no head_dim."""
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    return {"head_dim": hidden // heads} if isinstance(hidden, int) and isinstance(heads, int) and heads else {}


def _own_heads(text: Text) -> dict[str, Any]:
    return {} if text.get("head_dim") else _whole_heads(text)


def _biased(text: Text) -> dict[str, Any]:
    return {"attention_bias": bool(text.get("use_bias")), "mlp_bias": bool(text.get("use_bias"))} | _own_heads(text)


@dataclass(frozen=True)
class Wrapper:
    """classes: the text's model_type -> its class; where config.json has no section for it, the text's settings stand
    at its top, and "" -> its class. model_types: a text's model_type -> that of the class alone, where it has another.
    plain: keys that say of text what is so without them: positions of three kinds, which are one for text. defaults: of
    transformers' class, for keys that its config.json leaves out. always: what its code has whatever config.json says,
    from the text's settings. section: where these stand. own_head: the text's section says whether its head is tied."""

    classes: Mapping[str, str]
    model_types: Mapping[str, str] = field(default_factory=dict)
    plain: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    always: Callable[[Text], dict[str, Any]] = _nothing_more
    section: str = "text_config"
    own_head: bool = False


_MROPE = ("mrope_section", "mrope_interleaved")
_OF_QWEN = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
_GLM4V = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "num_key_value_heads": 2,
    "rope_theta": 1e4, "partial_rotary_factor": 1.0,
}  # fmt: skip
WRAPPERS: dict[str, Wrapper] = {
    "Mistral3ForConditionalGeneration": Wrapper(
        {"ministral3": "Ministral3ForCausalLM", "mistral": "MistralForCausalLM"}
    ),
    "Gemma3ForConditionalGeneration": Wrapper(
        {"gemma3_text": "Gemma3ForCausalLM"},
        defaults={
            "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
    ),
    "Qwen2_5_VLForConditionalGeneration": Wrapper(
        {"qwen2_5_vl_text": "Qwen2ForCausalLM", "": "Qwen2ForCausalLM"},
        {"qwen2_5_vl_text": "qwen2", "": "qwen2"},
        _MROPE,
    ),
    "Qwen3VLForConditionalGeneration": Wrapper(
        {"qwen3_vl_text": "Qwen3ForCausalLM"},
        {"qwen3_vl_text": "qwen3"},
        _MROPE,
        {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 128000, "rope_theta": 5e5},
    ),
    "Qwen3VLMoeForConditionalGeneration": Wrapper(
        {"qwen3_vl_moe_text": "Qwen3MoeForCausalLM"},
        {"qwen3_vl_moe_text": "qwen3_moe"},
        _MROPE,
        {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 128000, "rope_theta": 5e5},
        always=lambda text: {"norm_topk_prob": True, "use_sliding_window": False} | _own_heads(text),
    ),
    "Glm4vForConditionalGeneration": Wrapper(
        {"glm4v_text": "Glm4ForCausalLM"},
        {"glm4v_text": "glm4"},
        _MROPE,
        _GLM4V,
        always=lambda text: {"attention_bias": True} | _whole_heads(text),
    ),
    "GlmOcrForConditionalGeneration": Wrapper(
        {"glm_ocr_text": "Glm4ForCausalLM"},
        {"glm_ocr_text": "glm4"},
        _MROPE,
        _GLM4V,
        always=lambda text: {"attention_bias": False} | _own_heads(text),
    ),
    "Glm4vMoeForConditionalGeneration": Wrapper(
        {"glm4v_moe_text": "Glm4MoeForCausalLM"},
        {"glm4v_moe_text": "glm4_moe"},
        _MROPE,
        {"attention_bias": True, "max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        always=lambda text: {"use_qk_norm": False} | _own_heads(text),
    ),
    "PaddleOCRVLForConditionalGeneration": Wrapper(
        {"paddleocr_vl_text": "LlamaForCausalLM", "": "LlamaForCausalLM"},
        {"paddleocr_vl_text": "llama", "": "llama"},
        _MROPE,
        {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 5e5,
         "num_key_value_heads": 2},
        always=_biased,
    ),
    "Lfm2VlForConditionalGeneration": Wrapper({"lfm2": "Lfm2ForCausalLM"}),
    "Qwen3_5ForConditionalGeneration": Wrapper({"qwen3_5_text": "Qwen3_5ForCausalLM"}),
    "Qwen3_5MoeForConditionalGeneration": Wrapper({"qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"}),
    "MiniCPMV4_6ForConditionalGeneration": Wrapper({"qwen3_5_text": "Qwen3_5ForCausalLM"}),
    "InternVLForConditionalGeneration": Wrapper(_OF_QWEN | {"llama": "LlamaForCausalLM"}),
    "InternS1ForConditionalGeneration": Wrapper(_OF_QWEN),
    "InternVLChatModel": Wrapper(_OF_QWEN | {"llama": "LlamaForCausalLM"}, section="llm_config", own_head=True),
}  # fmt: skip
_OUTER = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config", "compression_config", "eos_token_id",
          "bos_token_id", "pad_token_id", "transformers_version", "rope_scaling", "rope_parameters")  # fmt: skip


def is_wrapped(config: Mapping[str, Any]) -> bool:
    """Whether `text_part` finds another model in a config.json."""
    return text_part(config) is not config


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json of the text model alone; of other models as it is."""
    names = config.get("architectures")
    wrapper = next((WRAPPERS[name] for name in names if name in WRAPPERS), None) if isinstance(names, list) else None
    if wrapper is None:
        return config
    text = config.get(wrapper.section, config)
    kind = "" if text is config else text.get("model_type") if isinstance(text, Mapping) else None
    if not isinstance(text, Mapping) or kind not in wrapper.classes:
        return config
    outer = {key: config[key] for key in _OUTER if config.get(key) is not None}
    parts = [key for key in text if key.endswith(("_config", "_token_id")) and key != "quantization_config"]
    own = {key: value for key, value in text.items() if value is not None and key not in parts}
    ends = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in text}
    found = {**wrapper.defaults, **outer, **own, **ends, "architectures": [wrapper.classes[str(kind)]]}
    whole = ("quantization_config", "compression_config", *(() if wrapper.own_head else ("tie_word_embeddings",)))
    found |= {key: outer[key] for key in whole if key in outer}  # said of the whole model
    found["model_type"] = wrapper.model_types.get(str(kind), kind)
    for key in ("rope_scaling", "rope_parameters") if wrapper.plain else ():
        if isinstance(rope := found.get(key), Mapping):
            left = {name: value for name, value in rope.items() if name not in wrapper.plain and value != "mrope"}
            found[key] = left or None
    if isinstance(rope := found.get("rope_scaling"), Mapping) and set(rope.values()) == {"default"}:
        del found["rope_scaling"]  # it says nothing, and would hide rope_parameters
    return found | wrapper.always(text)
