"""What a .gguf file says of its model: general keys, and the architecture's own, from config.json alone.

Source: the GGUF specification (ggml/docs/gguf.md) and llama.cpp's loader, which names what it cannot do without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool import QtoolError
from qtool.convert.formats.gguf.types import FILE_TYPES
from qtool.convert.models.model_config import (
    GEMMA_WINDOW,
    SLIDING,
    completed,
    gguf_architecture,
    head_dim,
    layer_windows,
)
from qtool.convert.models.rope import Value, rope_keys

REQUIRED = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "rms_norm_eps", "vocab_size",
)  # fmt: skip
QUANTIZATION_VERSION = 2
WINDOWED = ("gemma2", "gemma3")  # llama.cpp's architectures, of those written here, whose layers slide
SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}  # with so many layers llama.cpp scales scores by hidden / heads


def add_metadata(writer: Any, config: Mapping[str, Any], name: str, file_type: str) -> None:
    """Write every key but the tokenizer's into a `gguf.GGUFWriter`. Raises QtoolError as `model_keys` does."""
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(FILE_TYPES[file_type])
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in model_keys(config).items():
        add[type(value)](key, value)


def model_keys(config: Mapping[str, Any]) -> dict[str, Value]:
    """The architecture's own keys. Raises QtoolError for a config that lacks one, or for a rotary scaling or an
    attention that llama.cpp does not know."""
    missing = [key for key in REQUIRED if config.get(key) is None]
    if missing:
        raise QtoolError(f"config.json lacks {', '.join(missing)}, which GGUF needs.")
    full, architecture, dim = completed(config), gguf_architecture(config), head_dim(config)
    heads = int(full["num_attention_heads"])
    keys: dict[str, Value] = {
        "block_count": int(full["num_hidden_layers"]),
        "context_length": int(full.get("max_position_embeddings") or 2048),
        "embedding_length": int(full["hidden_size"]),
        "feed_forward_length": int(full["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(full["num_key_value_heads"]),
        "attention.key_length": dim,
        "attention.value_length": dim,
        "attention.layer_norm_rms_epsilon": float(full["rms_norm_eps"]),
        "vocab_size": int(full["vocab_size"]),
        "rope.dimension_count": dim,
    }
    keys |= {f"rope.{key}": value for key, value in rope_keys(config).items()}
    if architecture in WINDOWED:
        keys |= _gemma_keys(full, architecture, heads, dim)
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def required_keys(architecture: str) -> list[str]:
    """Keys without which llama.cpp does not load a file, or loads it wrongly."""
    own = (
        "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
        "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base",
    )  # fmt: skip
    general = ("general.architecture", "general.file_type", "tokenizer.ggml.model", "tokenizer.ggml.tokens")
    windows = ("attention.sliding_window", "attention.sliding_window_pattern") if architecture in WINDOWED else ()
    return [*general, *(f"{architecture}.{key}" for key in (*own, *windows))]


def _gemma_keys(full: Mapping[str, Any], architecture: str, heads: int, dim: int) -> dict[str, Value]:
    """Windows, soft caps and the rotary base of sliding layers (llama.cpp src/models/gemma2.cpp, gemma3.cpp)."""
    layers = int(full["num_hidden_layers"])
    windows = layer_windows(full, layers)
    full_layers = [index for index, window in enumerate(windows) if window is None]
    period = full_layers[0] + 1 if full_layers else layers + 1
    if period == 1 or full_layers != [index for index in range(layers) if (index + 1) % period == 0]:
        raise QtoolError(
            f"config.json: attention slides in all of {layers} layers but {full_layers}; llama.cpp's {architecture} "
            "needs one layer in so many, and not every one, to attend to everything."
        )
    scale = int(full["hidden_size"]) // heads if layers == SCALED_BY_HIDDEN[architecture] else dim
    asked = full["query_pre_attn_scalar"]
    if asked != scale:
        raise QtoolError(f"config.json: query_pre_attn_scalar is {asked}; llama.cpp's {architecture} takes {scale}.")
    keys: dict[str, Value] = {
        "attention.sliding_window": int(full.get("sliding_window") or GEMMA_WINDOW),
        "attention.sliding_window_pattern": period,
    }
    final = full.get("final_logit_softcapping")
    if final is not None:
        keys["final_logit_softcapping"] = float(final)
    if architecture == "gemma2":
        cap = full.get("attn_logit_softcapping")
        if cap is None or final is None:
            raise QtoolError("config.json: a soft cap is null; llama.cpp's gemma2 always has both.")
        return keys | {"attn_logit_softcapping": float(cap)}
    local = rope_keys(full, SLIDING)
    if len(local) > 1:
        raise QtoolError("config.json: sliding layers with a rotary scaling of their own cannot be written as GGUF.")
    return keys | {"rope.freq_base_swa": local["freq_base"]}
