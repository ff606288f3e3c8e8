"""What a config.json says and what it leaves to transformers: defaults, tied heads, attention windows, rotary settings.

The rules are those of transformers 5.23 (models/*/configuration_*.py, modeling_rope_utils.py); where vLLM's differ, the
config is refused (`config_keys.check_config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool import QtoolError
from qtool.convert.models.family import FULL, SLIDING, Windows
from qtool.convert.models.table import architecture_name, find_family

SCALED_ROPES = ("llama3", "yarn", "longrope")  # those that know the length before scaling


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the defaults of its architecture's class for the keys it does not have. Raises QtoolError where
    a key and another name for it (`Family.aliases`) say different things."""
    family = find_family(config)
    said = dict(config)
    for alias, key in family.aliases.items() if family else ():
        if said.get(alias) is None:
            continue
        if said.get(key) not in (None, said[alias]):
            raise QtoolError(
                f"config.json: {key} is {said[key]!r} and {alias} is {said[alias]!r}; both name one thing."
            )
        said[key] = said[alias]
    full = {**_defaults(config), **said}
    if full.get("num_key_value_heads") is None:
        full["num_key_value_heads"] = full.get("num_attention_heads")
    derived = family.derived(full) if family else {}
    return full | {key: value for key, value in derived.items() if full.get(key) is None}


def runtime_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What an artifact's config.json has to say beside the source's, for a runtime that looks for it elsewhere."""
    family = find_family(config)
    return family.runtime_keys(completed(config)) if family else {}


def head_dim(config: Mapping[str, Any]) -> int:
    """Numbers in one head's query."""
    full = completed(config)
    return int(full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"])


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding."""
    tied = config.get("tie_word_embeddings")
    return bool(_defaults(config).get("tie_word_embeddings") if tied is None else tied)


def layer_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """For each layer the tokens its attention looks back on, None for all: by the rule of its family (`Windows`), and
    without a family by the keys that are there."""
    family, full = find_family(config), completed(config)
    rule = family.windows if family else Windows("some")
    window = full.get("sliding_window")
    if rule.which == "none" or not isinstance(window, int):
        return (None,) * layers
    off = full.get("use_sliding_window", False if rule.switched else None) is False
    if off and (rule.switched or rule.which != "all"):
        return (None,) * layers
    if rule.which == "all":
        return (window,) * layers
    kinds = full.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return tuple(window if "sliding" in str(kind) else None for kind in kinds)
    if rule.period is not None:
        period = int((full.get(rule.period_key) if rule.period_key else None) or rule.period)
        return tuple(window if (index + 1) % period else None for index in range(layers))
    first = full.get("max_window_layers") if "use_sliding_window" in full else 0
    return tuple(window if index >= int(first or 0) else None for index in range(layers))


def rope_parameters(config: Mapping[str, Any], kind: str = FULL) -> dict[str, Any]:
    """The rotary settings of either generation of config.json; `rope_theta`, `rope_type` and, where the type has one,
    `original_max_position_embeddings` are always there. ``kind``: of the layers, which in some families have settings
    of their own (`Family.rope_kinds`). transformers takes `rope_scaling`, where it says anything, and then leaves out
    `rope_parameters`. Raises QtoolError for settings that are no mapping, or nested where the code reads flat ones."""
    full = completed(config)
    given, scaling = _mapping(full, "rope_parameters"), _mapping(config, "rope_scaling")
    theta = full.get("rope_theta", 1e4)
    nested = [key for key in given if isinstance(given[key], Mapping) or key in (FULL, SLIDING)]
    family = find_family(config)
    by_kind = len(family.rope_kinds) > 1 if family else bool(nested)
    if by_kind:
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
        if length is not None and kind == FULL and (family is None or len(family.rope_kinds) == 1):
            rope["original_max_position_embeddings"] = length  # transformers prefers the one outside
    return rope


def _mapping(config: Mapping[str, Any], key: str, above: str = "") -> dict[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise QtoolError(f"config.json: {above}{key} is {value!r}; a mapping is needed.")
    return dict(value)


def _defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    family = find_family(config)
    return family.defaults if family else {}
