"""What a .gguf file says of its model: general keys, and the architecture's own, from config.json alone.

Source: the GGUF specification (ggml/docs/gguf.md) and llama.cpp's loader, which names what it cannot do without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool import QtoolError
from qtool.convert.gguf_names import gguf_architecture
from qtool.convert.gguf_types import FILE_TYPES
from qtool.convert.model_config import GEMMA_WINDOW, SLIDING, layer_windows, rope_parameters

REQUIRED = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "rms_norm_eps", "vocab_size",
)  # fmt: skip
QUANTIZATION_VERSION = 2
WINDOWED = ("gemma2", "gemma3")  # llama.cpp's architectures, of those written here, whose layers slide
SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}  # with so many layers llama.cpp scales scores by hidden / heads


def add_metadata(writer: Any, config: Mapping[str, Any], name: str, file_type: str) -> None:
    """Write every key but the tokenizer's into a `gguf.GGUFWriter`. Raises QtoolError for a config that lacks one, or
    for a rotary scaling or an attention that llama.cpp does not know."""
    missing = [key for key in REQUIRED if config.get(key) is None]
    if missing:
        raise QtoolError(f"config.json lacks {', '.join(missing)}, which GGUF needs.")
    heads = int(config["num_attention_heads"])
    dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(FILE_TYPES[file_type])
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config.get("max_position_embeddings") or 2048))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_rope_dimension_count(dim)
    _add_rope(writer, config)
    if gguf_architecture(config) in WINDOWED:
        _add_gemma(writer, config, gguf_architecture(config), heads, dim)


def required_keys(architecture: str) -> list[str]:
    """Keys without which llama.cpp does not load a file, or loads it wrongly."""
    own = (
        "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
        "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base",
    )  # fmt: skip
    general = ("general.architecture", "general.file_type", "tokenizer.ggml.model", "tokenizer.ggml.tokens")
    windows = ("attention.sliding_window", "attention.sliding_window_pattern") if architecture in WINDOWED else ()
    return [*general, *(f"{architecture}.{key}" for key in (*own, *windows))]


def _add_rope(writer: Any, config: Mapping[str, Any]) -> None:
    rope = rope_parameters(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 1e6 if gguf_architecture(config) == "gemma3" else 1e4)))
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if kind in ("default", "llama3"):  # llama3's factors are a tensor of their own
        return
    if kind not in ("linear", "yarn"):
        raise QtoolError(f"config.json: rotary scaling {kind!r} cannot be written as GGUF; default, linear, yarn and "
                         "llama3 can.")  # fmt: skip
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType(kind))
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        context = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(context))
        optional = {
            "attention_factor": writer.add_rope_scaling_yarn_attn_factor,
            "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
            "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
        }
        for key, add in optional.items():
            if rope.get(key) is not None:
                add(float(rope[key]))


def _add_gemma(writer: Any, config: Mapping[str, Any], architecture: str, heads: int, dim: int) -> None:
    """Windows, soft caps and the rotary base of sliding layers (llama.cpp src/models/gemma2.cpp, gemma3.cpp)."""
    layers = int(config["num_hidden_layers"])
    windows = layer_windows(config, layers)
    full = [index for index, window in enumerate(windows) if window is None]
    period = full[0] + 1 if full else layers + 1
    if period == 1 or full != [index for index in range(layers) if (index + 1) % period == 0]:
        raise QtoolError(
            f"config.json: attention slides in all of {layers} layers but {full}; llama.cpp's {architecture} needs one "
            "layer in so many, and not every one, to attend to everything."
        )
    scale = int(config["hidden_size"]) // heads if layers == SCALED_BY_HIDDEN[architecture] else dim
    asked = config.get("query_pre_attn_scalar", 256)
    if asked != scale:
        raise QtoolError(f"config.json: query_pre_attn_scalar is {asked}; llama.cpp's {architecture} takes {scale}.")
    writer.add_sliding_window(int(config.get("sliding_window", GEMMA_WINDOW)))
    writer.add_sliding_window_pattern(period)
    final = config.get("final_logit_softcapping", 30.0 if architecture == "gemma2" else None)
    if final is not None:
        writer.add_final_logit_softcapping(float(final))
    if architecture == "gemma2":
        cap = config.get("attn_logit_softcapping", 50.0)
        if cap is None or final is None:
            raise QtoolError("config.json: a soft cap is null; llama.cpp's gemma2 always has both.")
        writer.add_attn_logit_softcapping(float(cap))
        return
    rope = rope_parameters(config, SLIDING)
    if (rope.get("rope_type") or "default") != "default":
        raise QtoolError("config.json: sliding layers with a rotary scaling of their own cannot be written as GGUF.")
    writer.add_rope_freq_base_swa(float(rope.get("rope_theta", 1e4)))
