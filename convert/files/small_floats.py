"""What config.json says of a checkpoint in float8 or MXFP4. How its tensors are read: decoded.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qtool import QtoolError

SECTION = "quantization_config"
_SECTIONS = (SECTION, "compression_config")


def small_floats_of(config: Mapping[str, Any]) -> str:
    """What config.json says of matrices in float8 or MXFP4, in words for a manifest; empty where it says nothing of the
    kind. Raises QtoolError for a cache in float8, whose scales no output keeps, for matrices that see rotated inputs,
    and for what is no plain MXFP4."""
    section = section_of(config)
    method, form = section.get("quant_method"), section.get("format")
    if method == "mxfp4":
        return "mxfp4"
    if method == "fp8":
        block = section.get("weight_block_size")
        return f"fp8, blocks of {block[0]} x {block[1]}" if isinstance(block, list) and len(block) == 2 else "fp8"
    if method != "compressed-tensors" or form not in ("float-quantized", "mxfp4-pack-quantized"):
        return ""
    if section.get("kv_cache_scheme") is not None:
        raise QtoolError("config.json: kv_cache_scheme is set: the cache's scales would be lost.")
    if section.get("transform_config"):
        raise QtoolError("config.json: transform_config is set: inputs are rotated before the matrices see them, which "
                         "no output does.")  # fmt: skip
    if form == "mxfp4-pack-quantized":
        for weights in group_weights(section):
            if weights.get("symmetric") is False or weights.get("num_bits") != 4 or weights.get("group_size") != 32:
                raise QtoolError("config.json: says mxfp4-pack-quantized, which is symmetric, of 4 bits, in groups of "
                                 f"32; its weights are {dict(weights)}.")  # fmt: skip
    return f"compressed-tensors {form}"


def without_small_floats(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the model that is read: without the section, where it speaks of float8 or MXFP4."""
    gone = _SECTIONS if small_floats_of(config) else ()
    return {key: value for key, value in config.items() if key not in gone}


def section_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section; empty where there is none."""
    found: Any = next((config[key] for key in _SECTIONS if config.get(key)), {})
    return found if isinstance(found, Mapping) else {}


def group_weights(section: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Of compressed-tensors' section what it says of the weights of each group."""
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights
