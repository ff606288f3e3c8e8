"""What a .gguf file says of its model: general keys, and the architecture's own, from config.json alone.

Source: the GGUF specification (ggml/docs/gguf.md) and llama.cpp's loader, which names what it cannot do without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool import QtoolError
from qtool.convert.formats.gguf.types import FILE_TYPES
from qtool.convert.models.family import GgufFacts, Value
from qtool.convert.models.model_config import completed
from qtool.convert.models.rope import rope_keys, ropes, rotary_dim
from qtool.convert.models.shape import shape_of
from qtool.convert.models.table import gguf_facts

REQUIRED = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size",
)  # fmt: skip
QUANTIZATION_VERSION = 2


def add_metadata(writer: Any, config: Mapping[str, Any], name: str, file_type: str) -> None:
    """Write every key but the tokenizer's into a `gguf.GGUFWriter`. Raises QtoolError as `model_keys` does."""
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(FILE_TYPES[file_type])
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in model_keys(config).items():
        add[type(value)](key, value)


def model_keys(config: Mapping[str, Any]) -> dict[str, Value]:
    """The architecture's own keys. Raises QtoolError for a config that lacks one, or for a rotary scaling or an
    attention that llama.cpp does not know."""
    full, facts = completed(config), gguf_facts(config)
    said, epsilon = facts.epsilon
    missing = [key for key in (*REQUIRED, said) if full.get(key) is None]
    if missing:
        raise QtoolError(f"config.json lacks {', '.join(missing)}, which GGUF needs.")
    shape = shape_of(config)
    keys: dict[str, Value] = {
        "block_count": shape.layers,
        "context_length": int(full.get("max_position_embeddings") or 2048),
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.intermediate,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        epsilon: float(full[said]),
        "vocab_size": shape.vocab,
        "rope.dimension_count": rotary_dim(config),
    }
    keys |= {f"rope.{key}": value for key, value in rope_keys(config).items()}
    keys |= facts.keys(full, shape, ropes(config))
    return {f"{facts.architecture}.{key}": value for key, value in keys.items()}


def required_keys(facts: GgufFacts) -> list[str]:
    """Keys without which llama.cpp does not load a file, or loads it wrongly."""
    own = (
        "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
        "attention.head_count_kv", facts.epsilon[1], "rope.freq_base",
    )  # fmt: skip
    general = ("general.architecture", "general.file_type", "tokenizer.ggml.model", "tokenizer.ggml.tokens")
    return [*general, *(f"{facts.architecture}.{key}" for key in (*own, *facts.required))]
