"""What config.json implies of the weights: names and shapes of every tensor, as transformers' own classes have them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.formats.gguf.names import SUFFIXES, modules
from qtool.convert.models.shape import decoder_of
from qtool.convert.models.table import prefix_of
from qtool.convert.models.tied import EMBEDDING
from qtool.convert.skeleton import build_skeleton, file_shapes, load_config

Shapes = Mapping[str, tuple[int, ...]]
_COUNTS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")


@dataclass(frozen=True)
class Implied:
    """``shapes``: name -> shape, None where only the model's own code knows it. ``absent``: may be missing, because it
    is tied. ``matrices``: the weights that a quantized artifact quantizes, all of them."""

    shapes: Mapping[str, tuple[int, ...] | None]
    absent: frozenset[str]
    matrices: list[str]


def implied(folder: Path, config: Mapping[str, Any], stored: Shapes) -> Implied:
    """What ``folder``'s config.json implies. ``stored``: the tensors that are there, with which its numbers are
    compared before a model is built from them. Raises QtoolError naming the first that does not fit."""
    for fault in _numbers(config, stored):
        raise QtoolError(f"config.json {fault}. Weights and config.json are not of one model.")
    decoder = decoder_of(config)
    matrices = [f"{module}.weight" for held in decoder.held().values() for module, _ in held]
    if "auto_map" in config:  # whoever checks a file runs none of its code
        known = {module + suffix for module in modules(decoder) for suffix in SUFFIXES}
        return Implied(dict.fromkeys(name for name in stored if name in known), frozenset(), matrices)
    shapes, tied = file_shapes(build_skeleton(load_config(folder)), decoder)
    return Implied(shapes, frozenset(tied), matrices)


def _numbers(config: Mapping[str, Any], stored: Shapes) -> Iterator[str]:
    for key in ("num_hidden_layers", *_COUNTS):
        value = config.get(key)
        if value is not None and (type(value) is not int or not 0 < value < 2**31):
            yield f"says {key} {value!r}, which is no number above 0"
            return
    layer = re.compile(re.escape(prefix_of(config)) + r"(\d+)\.")
    layers = {int(found.group(1)) for name in stored if (found := layer.match(name))}
    said = config.get("num_hidden_layers")
    if said is not None and layers != set(range(min(said, len(layers) + 1))):
        yield f"says num_hidden_layers {said}, the weights have {len(layers)}"
    vocabulary, width = config.get("vocab_size"), config.get("hidden_size")
    table = stored.get(EMBEDDING)
    if table is not None and None not in (vocabulary, width) and table != (vocabulary, width):
        yield f"says vocab_size {vocabulary} and hidden_size {width}, {EMBEDDING} is {list(table)}"
    head = config.get("head_dim")
    rows = stored.get(f"{prefix_of(config)}0.self_attn.q_proj.weight")
    if head is not None and rows is not None and head > rows[0]:
        yield f"says head_dim {head}, q_proj has {rows[0]} rows"
