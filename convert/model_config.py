"""What a config.json leaves to transformers' defaults: tied heads, attention windows, rotary settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TIED = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")  # unless config.json says otherwise
PERIODS = {"Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 6}  # one layer in so many looks back on everything
GEMMA_WINDOW = 4096
FULL, SLIDING = "full_attention", "sliding_attention"


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding."""
    tied = config.get("tie_word_embeddings")
    return any(name in TIED for name in config.get("architectures") or []) if tied is None else bool(tied)


def layer_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """For each layer the tokens its attention looks back on, None for all.

    transformers' rules: `layer_types` decide where they are given; Gemma 2 and 3 alternate; Qwen slides only where
    `use_sliding_window` says so, and only from layer `max_window_layers` on.
    """
    period = next((PERIODS[name] for name in config.get("architectures") or [] if name in PERIODS), None)
    window = config.get("sliding_window", GEMMA_WINDOW if period else None)
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        return (None,) * layers
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return tuple(window if "sliding" in str(kind) else None for kind in kinds)
    if period is not None:
        period = int(config.get("sliding_window_pattern") or period)
        return tuple(window if (index + 1) % period else None for index in range(layers))
    first = config.get("max_window_layers") if "use_sliding_window" in config else 0
    return tuple(window if index >= int(first or 0) else None for index in range(layers))


def rope_parameters(config: Mapping[str, Any], kind: str = FULL) -> dict[str, Any]:
    """The rotary settings of either generation of config.json, `rope_theta` included. ``kind``: of the layers; only
    Gemma 3's sliding ones have settings of their own."""
    given = config.get("rope_parameters") or {}
    if isinstance(given.get(kind), Mapping):
        return dict(given[kind])
    if kind == SLIDING:
        local = config.get("rope_local_base_freq")
        return {} if local is None else {"rope_theta": local}
    rope = {**(config.get("rope_scaling") or {}), **given}
    if "rope_theta" not in rope and config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    return rope
