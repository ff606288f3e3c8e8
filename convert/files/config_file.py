"""config.json: the one place where it is read, and every value that a model is computed from checked before use.

transformers checks types in part, and sizes not at all: 10^9 layers are built until the memory ends.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.reading import read_json, refuse_link, shown
from qtool.convert.files.wrappers import text_part

CONFIG = "config.json"
MOST_LAYERS = 1024  # the deepest published decoders have below 200
FLOAT32 = (1e-37, 3e38)
DEPTH = 32  # of nested lists and mappings
# key -> the greatest value; the least is 1. The largest published models have 1/8 of each or less.
SIZES = {
    "hidden_size": 1 << 18, "intermediate_size": 1 << 20, "num_hidden_layers": MOST_LAYERS, "vocab_size": 1 << 24,
    "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14, "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 32,
}  # fmt: skip
_WINDOWS = ("sliding_window", "sliding_window_pattern", "max_window_layers", "loop_num", "loop_window_size")
_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar",
             "attn_logit_softcapping", "final_logit_softcapping")  # fmt: skip
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_cache", "is_decoder")
_WORDS = ("model_type", "hidden_act", "hidden_activation", "_attn_implementation", "attn_implementation")
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "mrope")
_ROPE_WORDS = ("rope_type", "type", "mscale_type")
# Keys that name methods of transformers' config class: a value would take their place.
_METHODS = re.compile(r"__\w+__|to_dict|to_diff_dict|to_json_string|to_json_file|from_\w+|save_pretrained|update\w*|"
                      r"get_\w+|validate\w*|push_to_hub|register_for_auto_class")  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder, of its text model where that is a part of it (`wrappers`). Raises QtoolError as
    `reading.read_json` and `check_config` do, and for a link out of the folder."""
    config = read_stored_config(folder)
    text = text_part(config)
    return config if text is config else check_config(dict(text), f"{folder / CONFIG}: text_config")


def read_stored_config(folder: Path) -> dict[str, Any]:
    """The same as it is stored."""
    path = folder / CONFIG
    refuse_link(folder, path)
    return check_config(read_json(path), str(path))


def check_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """``config`` as it is. Raises QtoolError naming ``where``, the key, its value and what is needed instead."""
    _finite(config, where, "", DEPTH)
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise QtoolError(f"{where}: architectures is {_said(names)}; a list of names is needed.")
    for key in config:
        if _METHODS.fullmatch(key):
            raise QtoolError(f"{where}: {shown(key)} is no key of a model.")
    _check(config, where)
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise QtoolError(f"{where}: text_config is {_said(text)}; a mapping is needed.")
    if isinstance(text, dict):
        _check(text, f"{where}: text_config")
    return config


def _check(config: Mapping[str, Any], where: str) -> None:
    for key, most in SIZES.items():
        _need(config, where, key, "a positive whole number", partial(_whole, 1, 1 << 63))
        _need(config, where, key, f"a whole number up to {most:,}", partial(_whole, 1, most))
    for key in _WINDOWS:
        _need(config, where, key, f"a whole number up to {1 << 32:,}", partial(_whole, 0, 1 << 32))
    for key in _POSITIVE:
        _need_positive(config, where, key)
    for key in _SWITCHES:
        _need(config, where, key, "true or false", lambda v: isinstance(v, bool))
    for key in _WORDS:
        _need(config, where, key, "a name", lambda v: isinstance(v, str) and re.fullmatch(r"[\w.|+-]+", v) is not None)
    for key in ("dtype", "torch_dtype"):
        _need(config, where, key, f"one of {', '.join(_DTYPES)}", _is_dtype)
    for key in _TOKENS:
        _need(config, where, key, "a token's number, or a list of them", _tokens)
    for key in ("rope_scaling", "rope_parameters", "quantization_config", "auto_map"):
        if not isinstance(config.get(key) or {}, dict):
            raise QtoolError(f"{where}: {key} is no mapping.")
    _need(config, where, "layer_types", "a list of names", _texts)
    for key in ("rope_scaling", "rope_parameters"):
        _check_rope(config.get(key) or {}, f"{where}: {key}")
    _check_heads(config, where)


def _check_heads(config: Mapping[str, Any], where: str) -> None:
    heads, own = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and own and heads % own:
        raise QtoolError(f"{where}: {heads} attention heads do not divide over num_key_value_heads {own}.")
    hidden = config.get("hidden_size")
    if heads and hidden and not config.get("head_dim") and hidden % heads:
        raise QtoolError(f"{where}: hidden_size {hidden} does not divide by {heads} heads, and there is no head_dim.")
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if kinds and layers and len(kinds) != layers:
        raise QtoolError(f"{where}: layer_types names {len(kinds)} layers, num_hidden_layers is {layers}.")


def _check_rope(rope: Mapping[str, Any], where: str) -> None:
    """One set of rotary settings, or one for each kind of layer."""
    for key, value in rope.items():
        if isinstance(value, dict):
            _check_rope(value, f"{where}: {key}")
        elif key in _ROPE_WORDS:
            if key != "mscale_type" and value not in (None, *ROPE_TYPES, "su"):
                raise QtoolError(f"{where}: {key} is {_said(value)}; known are {', '.join(ROPE_TYPES)}.")
        elif key in ("rope_theta", "factor", "original_max_position_embeddings"):
            _need_positive(rope, where, key)
        elif isinstance(value, list):
            _need(rope, where, key, "a list of numbers", lambda v: all(map(_number, v)))
        else:
            _need(rope, where, key, "a number", lambda v: _number(v) or isinstance(v, bool))


def _need(config: Mapping[str, Any], where: str, key: str, what: str, fits: Callable[[Any], bool]) -> None:
    """A key that is missing or null says nothing: whoever needs it says so."""
    value = config.get(key)
    if value is not None and not fits(value):
        raise QtoolError(f"{where}: {key} is {_said(value)}; {what} is needed.")


def _need_positive(config: Mapping[str, Any], where: str, key: str) -> None:
    """A number that is neither 0 nor without an end where runtimes compute, in float32."""
    _need(config, where, key, "a positive number", lambda v: _number(v) and v > 0)
    least, most = FLOAT32
    _need(config, where, key, f"a number from {least:g} to {most:g}", lambda v: least <= v <= most)


def _finite(value: Any, where: str, key: str, depth: int) -> None:
    """No number without an end or beyond 64 bits anywhere, and no nesting that a reader cannot follow."""
    if depth == 0:
        raise QtoolError(f"{where}: {shown(key)} is nested more than {DEPTH} deep.")
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _finite(inner, where, f"{key}.{name}" if key else str(name), depth - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise QtoolError(f"{where}: {shown(key)} is {value}; a finite number is needed.")
    elif isinstance(value, int) and abs(value) >= 1 << 63:
        raise QtoolError(f"{where}: {shown(key)} is {_said(value)}; a number of 64 bits is needed.")


def _said(value: Any) -> str:
    return f"about 10^{int(math.log10(abs(value)))}" if _huge(value) else shown(repr(value))


def _huge(value: Any) -> bool:
    return isinstance(value, int) and abs(value) >= 1 << 63  # Python refuses to print one of 5000 digits


def _whole(least: int, most: int, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tokens(value: Any) -> bool:
    return all(_whole(-1, 1 << 31, number) for number in (value if isinstance(value, list) else [value]))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value.removeprefix("torch.") in (*_DTYPES, "auto")
