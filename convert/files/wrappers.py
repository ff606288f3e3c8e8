"""Models of text and images whose text model is one that qtool knows: read as that model, the rest left out by name.

An output is a text model of its own, under the names and with the config.json that every runtime has for it; images
need the source. A vision tower is not quantized and not carried along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Wrapper:
    """classes: the text's model_type -> its class; where config.json has no text_config, the text's settings stand at
    its top, and "" -> its class. model_type: of the text model alone, where it has another. plain: keys that say of
    text what is so without them: positions of three kinds, which are one for text. defaults: of transformers' class,
    for keys that its config.json leaves out."""

    classes: Mapping[str, str]
    model_type: str = ""
    plain: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


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
        "qwen2",
        ("rope_scaling", "mrope_section"),
    ),
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
    text = config.get("text_config", config)
    kind = "" if text is config else text.get("model_type") if isinstance(text, Mapping) else None
    if wrapper is None or not isinstance(text, Mapping) or kind not in wrapper.classes:
        return config
    outer = {key: config[key] for key in _OUTER if config.get(key) is not None}
    own = {
        key: value for key, value in text.items() if value is not None and not key.endswith(("_config", "_token_id"))
    }
    ends = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in text}
    found = {**wrapper.defaults, **outer, **own, **ends, "architectures": [wrapper.classes[str(kind)]]}
    for key in ("quantization_config", "compression_config", "tie_word_embeddings"):  # said of the whole model
        if key in outer:
            found[key] = outer[key]
    found["model_type"] = wrapper.model_type or kind
    for key in wrapper.plain:
        found.pop(key, None)
    if wrapper.plain and isinstance(rope := found.get("rope_parameters"), Mapping):
        found["rope_parameters"] = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 1e4)}
    return found
