"""The tensors of a text model that lies in a model of text and images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.convert.files.tensor_info import TensorInfo
from qtool.convert.files.wrappers import is_wrapped

# how names begin -> what stands in their place: transformers 5's and transformers 4's files
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}


def text_names(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Stored tensors under the names that the text model alone has; others keep theirs. ``config``: as it is stored."""
    if not is_wrapped(config):
        return dict(tensors)
    nested = any(name.startswith("model.language_model.") for name in tensors)
    found = {}
    for name, info in tensors.items():
        begins = next((old for old in _PREFIXES if name.startswith(old)), "model." if nested else "")
        # towers lose the model's prefix, where they have it
        known = _PREFIXES.get(begins, "") + name.removeprefix(begins)
        found[known] = info if known == name else info.named(name)
    return dict(sorted(found.items()))
