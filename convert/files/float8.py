"""What config.json says of a checkpoint in float8. How its tensors are read: float8_tensors.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool import QtoolError

SECTION = "quantization_config"


def float8_of(config: Mapping[str, Any]) -> str:
    """What config.json says of matrices in float8, in words for a manifest; empty where it says nothing of the kind.
    Raises QtoolError for a cache in float8, whose scales no output keeps."""
    section = config.get(SECTION) or config.get("compression_config")
    if not isinstance(section, Mapping):
        return ""
    if section.get("quant_method") == "fp8":
        block = section.get("weight_block_size")
        return f"fp8, blocks of {block[0]} x {block[1]}" if isinstance(block, list) and len(block) == 2 else "fp8"
    if section.get("quant_method") != "compressed-tensors" or section.get("format") != "float-quantized":
        return ""
    if section.get("kv_cache_scheme") is not None:
        raise QtoolError("config.json: kv_cache_scheme is set: the cache's scales would be lost.")
    return "compressed-tensors float-quantized"


def without_float8(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the model that is read: without the section, where it speaks of float8."""
    gone = (SECTION, "compression_config") if float8_of(config) else ()
    return {key: value for key, value in config.items() if key not in gone}
