"""Which keys of config.json change what a model computes, and whether a format can say them.

Artifacts in safetensors copy config.json, which their readers follow; a .gguf file says it in keys of its own, so for
it every key that the model's code reads has to be in the table below: written, checked, or without effect on answers.
A key that is in no row and that the code reads is refused; keys that nobody reads stay where they are.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from qtool import QtoolError
from qtool.convert.models.family import FULL, SLIDING, Family
from qtool.convert.models.model_config import completed, layer_windows
from qtool.convert.models.rope import check_rope, rope_factors, rope_keys, ropes, rotary_dim, rotation
from qtool.convert.models.table import FAMILIES, family_of, find_family, gguf_facts

# said by a key, by a tensor, or by the architecture that a .gguf file names; a family's own keys: `GgufFacts.says`
WRITTEN = frozenset((
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_theta", "rope_scaling", "rope_parameters",
    "original_max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
))  # fmt: skip
# compared with what llama.cpp always does (`check_gguf`, `check_config`), or its limit is told
CHECKED = frozenset((
    "hidden_act", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "clip_qkv",
    "partial_rotary_factor", "use_bidirectional_attention", "is_causal", "is_decoder", "attention_chunk_size",
    "per_layer_config",
))  # fmt: skip
# training, generation, and how, not what, is computed
HARMLESS = frozenset((
    "attention_dropout", "hidden_dropout", "initializer_range", "use_cache", "pretraining_tp", "output_attentions",
    "output_hidden_states", "return_dict", "use_return_dict", "dtype", "torch_dtype", "_attn_implementation",
    "attn_implementation", "transformers_version", "chunk_size_feed_forward", "gradient_checkpointing",
    "quantization_config", "auto_map", "name_or_path", "_name_or_path", "id2label", "label2id", "num_labels",
    "problem_type", "output_router_logits", "router_aux_loss_coef",
))  # fmt: skip
LIMIT = "right only up to"  # how a line on a limit begins
CAUSAL = {"is_causal": True, "use_bidirectional_attention": False}  # the values of a model that answers
CODE = ("transformers.models.", "transformers_modules.")  # transformers' own models; code that came with a model
COMMON = ("transformers.masking_utils", "transformers.modeling_rope_utils")  # what all of them call
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
}
_READ = re.compile(r"""\bconfig\.([a-zA-Z_]\w*)|getattr\(\s*(?:self\.)?config,\s*["'](\w+)["']""")
_TAKEN = re.compile(r"""kwargs\.(?:get|pop)\(\s*["'](\w+)["']""")


def check_config(config: Mapping[str, Any]) -> None:
    """Raises QtoolError for what no output can be right about: settings that one runtime follows and another does not,
    so that the model they mean cannot be told, and models that do not answer from left to right."""
    family = find_family(config)
    if config.get("per_layer_config"):
        raise QtoolError("config.json: per_layer_config gives layers settings of their own; qtool's layers are alike.")
    for key, usual in CAUSAL.items():
        if config.get(key) not in (None, usual):
            raise QtoolError(f"config.json: {key} is {config[key]!r}; qtool quantizes models that answer from left to "
                             "right.")  # fmt: skip
    for kind in family.rope_kinds if family else ():
        check_rope(config, kind)
    attention = config.get("_attn_implementation") or config.get("attn_implementation") or "eager"
    if config.get("output_attentions") and attention != "eager":
        raise QtoolError(
            f"config.json: output_attentions is true, and the attention named is {attention!r}; transformers gives "
            "them with 'eager' alone. Remove output_attentions: no answer needs it."
        )
    if family is not None:
        _check_windows(config, family)


def check_class(config: Any, trust_remote_code: bool = False) -> None:
    """Raises QtoolError where transformers, which goes by model_type, would build another class than the one that
    config.json names, by which vLLM and qtool go."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = config.architectures or []
    chosen = next((name for name in names if name in FAMILIES), "")  # as `find_family`
    built = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    own = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if built is not None and not own and chosen and built not in (chosen, FAMILIES[chosen].built_as):
        raise QtoolError(f"config.json: model_type {config.model_type!r} makes transformers build {built}, but "
                         f"architectures names {', '.join(names)}. They are not of one model.")  # fmt: skip


def _check_windows(config: Mapping[str, Any], family: Family) -> None:
    """Windows that attention and its cache, or two runtimes, read differently."""
    full = completed(config)
    longest = full.get("max_position_embeddings")
    layers = config.get("num_hidden_layers")
    kinds = config.get("layer_types")
    sliding = isinstance(kinds, list) and any(kind == SLIDING for kind in kinds)
    if not isinstance(layers, int):
        return
    for key in ("sliding_window", "attention_chunk_size"):
        window = config.get(key)
        read = key == "sliding_window" and family.windows.which != "none"
        off = key == "sliding_window" and "use_sliding_window" in full and not full["use_sliding_window"]
        if window is None or off:
            continue
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise QtoolError(f"config.json: {key} is {window!r}; a positive whole number or null is needed.")
        if not read and isinstance(longest, int) and window < longest:
            raise QtoolError(f"config.json: {key} is {window}, at which the attention of transformers' {family.name} "
                             "does not look and its key/value cache does. Set it to null if every token attends to all "
                             "before it.")  # fmt: skip
    if isinstance(kinds, list) and len(kinds) != layers:
        raise QtoolError(f"config.json: layer_types names {len(kinds)} layers, num_hidden_layers {layers}.")
    every, window = family.windows.which == "all", full.get("sliding_window")
    if every and window is not None and isinstance(kinds, list) and any(k != SLIDING for k in kinds):
        raise QtoolError(f"config.json: layer_types lets some layers attend to everything; transformers' {family.name} "
                         "slides in all of them, vLLM's does not. Name the one that is meant.")  # fmt: skip
    if sliding and not any(layer_windows(config, layers)) and not every:
        raise QtoolError(f"config.json: layer_types lets layers slide ({SLIDING}), but there is no window for them: "
                         "sliding_window is null or use_sliding_window is false.")  # fmt: skip


def check_gguf(config: Mapping[str, Any]) -> list[str]:
    """What a .gguf file of this model is right only up to, a line each. Raises QtoolError naming the key of what
    llama.cpp would compute otherwise."""
    check_config(config)
    facts, full = gguf_facts(config), completed(config)
    target, activation = facts.architecture, family_of(config).activation
    found = full.get(activation.key)
    if found not in activation.names:
        raise QtoolError(
            f"config.json: {activation.key} is {found!r}; llama.cpp's {target} always computes {activation.names[0]}."
        )
    if full.get("clip_qkv") is not None:
        raise QtoolError(f"config.json: clip_qkv is {full['clip_qkv']!r}; llama.cpp's {target} clips nothing.")
    if full.get("attention_bias") and not facts.biases:
        raise QtoolError(f"config.json: attention_bias is set; llama.cpp's {target} has no biases.")
    rope = ropes(config)
    if rope_factors(config) is not None and not facts.factors:
        raise QtoolError(f"config.json: rotary scaling 'llama3' cannot be written for llama.cpp's {target}.")
    facts.refuse(full, rope)
    return window_limits(config)


def window_limits(config: Mapping[str, Any]) -> list[str]:
    """A line where llama.cpp attends to more than the model's window lets it. Raises QtoolError for an architecture
    that llama.cpp does not know."""
    facts, full = gguf_facts(config), completed(config)
    windows = layer_windows(config, int(config["num_hidden_layers"]))
    shortest = min((window for window in windows if window is not None), default=None)
    if facts.windows or shortest is None or shortest >= full["max_position_embeddings"]:
        return []
    count = sum(window is not None for window in windows)
    return [
        f"{LIMIT} the window of {shortest} tokens: config.json's sliding_window lets {count} of "
        f"{len(windows)} layers attend to the last {shortest} tokens alone, llama.cpp's "
        f"{facts.architecture} attends to all"
    ]


def prove_gguf(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Compare transformers' own model (without weights) with what llama.cpp computes from the file's keys: activation,
    rotary tables, and that no key is read which the table does not have. Raises QtoolError."""
    facts = gguf_facts(config)
    target, known = facts.architecture, WRITTEN | CHECKED | HARMLESS | facts.says
    strangers = sorted(key for key in keys_read(model) if config.get(key) is not None and key not in known)
    if strangers:
        raise QtoolError(f"config.json: {strangers[0]} is {config[strangers[0]]!r}; the model's code reads it, and no "
                         f"key of a GGUF file of architecture {target} is known to say it.")  # fmt: skip
    x = torch.linspace(-8, 8, 321)
    expected = FUNCTIONS[family_of(config).activation.function](x)
    for name, module in model.named_modules():
        activation = getattr(module, "act_fn", None)
        if callable(activation) and not torch.allclose(activation(x), expected, atol=1e-5):
            raise QtoolError(f"config.json: {name} computes another activation than llama.cpp's {target}.")
    for kind, radians, magnitude in _rotations(model):
        factors = rope_factors(config) if kind == FULL else None
        found, scale = rotation(rope_keys(config, kind), rotary_dim(config), factors)
        same = found.shape == radians.shape and torch.allclose(found, radians.double(), rtol=1e-4, atol=0)
        if not same or abs(scale - magnitude) > 1e-5 * abs(magnitude):
            raise QtoolError("config.json: transformers turns positions otherwise than llama.cpp would from the rotary "
                             f"settings as GGUF can say them ({_settings(config)}).")  # fmt: skip


def keys_read(model: nn.Module) -> set[str]:
    """Names that the source of the model's classes, of its config's, and of what both call reads from a config."""
    kinds = [*type(model).__mro__, *type(model.config).__mro__, *{type(module) for module in model.modules()}]
    modules = {kind.__module__ for kind in kinds if kind.__module__.startswith(CODE)}
    found: set[str] = set()
    for name in (*sorted(modules), *COMMON):
        source = inspect.getsource(sys.modules[name])
        found |= {a or b for a, b in _READ.findall(source)}
        if "configuration_" in name:
            found |= set(_TAKEN.findall(source))
    return found


def _rotations(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, float]]:
    """(kind of layers, radians a position, what cosines and sines are multiplied by) of every rotary table."""
    for module in model.modules():
        for kind in (FULL, SLIDING):
            buffer = getattr(module, f"{kind}_inv_freq", None)
            if isinstance(buffer, torch.Tensor):
                yield kind, buffer, float(getattr(module, f"{kind}_attention_scaling", 1.0))
        buffer = getattr(module, "inv_freq", None)
        if isinstance(buffer, torch.Tensor):
            yield FULL, buffer, float(getattr(module, "attention_scaling", 1.0))


def _settings(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {config[key]!r}" for key in ("rope_scaling", "rope_parameters") if config.get(key))
