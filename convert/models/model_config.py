"""What a config.json says and what it leaves to transformers: defaults, tied heads, attention windows, rotary settings.

The rules are those of transformers 5.23 (models/*/configuration_*.py, modeling_rope_utils.py); where vLLM's differ, the
config is refused (`config_keys.check_config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool import QtoolError

TIED = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")  # unless config.json says otherwise
PERIODS = {"Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 6}  # one layer in so many looks back on everything
GEMMA_WINDOW = 4096
FULL, SLIDING = "full_attention", "sliding_attention"
SCALED_ROPES = ("llama3", "yarn", "longrope")  # those that know the length before scaling

# What transformers' classes take for a key that config.json does not have. What is not here is None or False for all.
_SILU: dict[str, Any] = {"hidden_act": "silu", "rope_theta": 1e4}
_QWEN = _SILU | {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096,
                 "max_window_layers": 28}  # fmt: skip
_GEMMA: dict[str, Any] = {
    "head_dim": 256, "max_position_embeddings": 8192, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA2 = _GEMMA | {"hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 4,
                    "sliding_window": GEMMA_WINDOW, "query_pre_attn_scalar": 256}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _SILU | {"max_position_embeddings": 2048},
    "MistralForCausalLM": _SILU | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "Qwen2ForCausalLM": _QWEN,
    "Qwen3ForCausalLM": _QWEN | {"head_dim": 128},
    # its own code: configuration_iquestcoder.py
    "IQuestCoderForCausalLM": _SILU | {
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 16384, "rope_theta": 5e5,
        "max_window_layers": 0,
    },
    "GemmaForCausalLM": _GEMMA | {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16},
    "Gemma2ForCausalLM": _GEMMA2 | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "Gemma3ForCausalLM": _GEMMA2 | {"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
}  # fmt: skip
WITHOUT_WINDOWS = ("LlamaForCausalLM", "GemmaForCausalLM")  # their code looks at no window
BY_SWITCH = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "IQuestCoderForCausalLM")  # `use_sliding_window`


def architecture_name(config: Mapping[str, Any]) -> str:
    """The first architecture named that has a row of `DEFAULTS`; else the first; empty where none is named."""
    names = config.get("architectures")
    names = names if isinstance(names, list) else []
    return next((name for name in names if name in DEFAULTS), str(names[0]) if names else "")


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the defaults of its architecture's class for the keys it does not have."""
    full = DEFAULTS.get(architecture_name(config), {}) | dict(config)
    if full.get("num_key_value_heads") is None:
        full["num_key_value_heads"] = full.get("num_attention_heads")
    return full


def head_dim(config: Mapping[str, Any]) -> int:
    """Numbers in one head's query."""
    full = completed(config)
    return int(full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"])


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding."""
    tied = config.get("tie_word_embeddings")
    return any(name in TIED for name in config.get("architectures") or []) if tied is None else bool(tied)


def layer_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """For each layer the tokens its attention looks back on, None for all.

    transformers' rules: Llama and Gemma look at no window and Mistral's is every layer's, whatever `layer_types` says;
    Qwen slides only where `use_sliding_window` says so, from layer `max_window_layers` on unless `layer_types` are
    given; Gemma 2 and 3 follow `layer_types`, or alternate. Architectures without a row go by the keys they have.
    """
    architecture, full = architecture_name(config), completed(config)
    period = PERIODS.get(architecture)
    window = full.get("sliding_window")
    if architecture in WITHOUT_WINDOWS or not isinstance(window, int):
        return (None,) * layers
    if architecture == "MistralForCausalLM":
        return (window,) * layers
    if full.get("use_sliding_window", False if architecture in BY_SWITCH else None) is False:
        return (None,) * layers
    kinds = full.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return tuple(window if "sliding" in str(kind) else None for kind in kinds)
    if period is not None:
        period = int((full.get("sliding_window_pattern") if architecture == "Gemma3ForCausalLM" else None) or period)
        return tuple(window if (index + 1) % period else None for index in range(layers))
    first = full.get("max_window_layers") if "use_sliding_window" in full else 0
    return tuple(window if index >= int(first or 0) else None for index in range(layers))


def rope_parameters(config: Mapping[str, Any], kind: str = FULL) -> dict[str, Any]:
    """The rotary settings of either generation of config.json; `rope_theta`, `rope_type` and, where the type has one,
    `original_max_position_embeddings` are always there. ``kind``: of the layers; only Gemma 3's sliding ones have
    settings of their own. transformers takes `rope_scaling`, where it says anything, and then leaves out
    `rope_parameters`. Raises QtoolError for settings that are no mapping, or nested where the code reads flat ones."""
    full = completed(config)
    given, scaling = _mapping(config, "rope_parameters"), _mapping(config, "rope_scaling")
    theta = full.get("rope_theta", 1e4)
    nested = [key for key in given if isinstance(given[key], Mapping) or key in (FULL, SLIDING)]
    architecture = architecture_name(config)
    if architecture == "Gemma3ForCausalLM" or (nested and architecture not in DEFAULTS):
        flat = sorted(set(given) - {FULL, SLIDING})
        if flat:
            raise QtoolError(f"config.json: rope_parameters has settings for each kind of layer ({FULL}, "
                             f"{SLIDING}); {', '.join(flat)} would be read by nobody.")  # fmt: skip
        rope = dict(_mapping(given, kind, "rope_parameters.")) | (scaling if kind == FULL else {})
        theta = theta if kind == FULL else full.get("rope_local_base_freq", theta)
    elif nested and not scaling:
        raise QtoolError(f"config.json: rope_parameters has settings of its own for {', '.join(nested)}; the code of "
                         f"{architecture_name(config)} reads one set for all layers.")  # fmt: skip
    else:
        rope = dict(scaling or given)
    rope.setdefault("rope_theta", theta)
    rope.setdefault("rope_type", rope.get("type", "default"))
    if full.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", full["partial_rotary_factor"])
    if rope["rope_type"] in SCALED_ROPES:
        length = full.get("original_max_position_embeddings")
        rope.setdefault("original_max_position_embeddings", full.get("max_position_embeddings"))
        if length is not None and kind == FULL and architecture_name(config) != "Gemma3ForCausalLM":
            rope["original_max_position_embeddings"] = length  # transformers prefers the one outside
    return rope


def _mapping(config: Mapping[str, Any], key: str, above: str = "") -> dict[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise QtoolError(f"config.json: {above}{key} is {value!r}; a mapping is needed.")
    return dict(value)


# config.json's architecture -> general.architecture of a .gguf file
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "IQuestCoderForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
}


def gguf_architecture(config: Mapping[str, Any]) -> str:
    """`general.architecture` of a config.json. Raises QtoolError naming the architecture and those known."""
    names = config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise QtoolError(
        f"architecture {', '.join(names) or '(none named in config.json)'} cannot be written as GGUF yet. Known: "
        f"{', '.join(ARCHITECTURES)}."
    )
