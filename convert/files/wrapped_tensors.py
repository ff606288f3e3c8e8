"""The tensors of a text model that lies in a model of text and images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool import QtoolError
from qtool.convert.files.reading import shown
from qtool.convert.files.tensor_info import TensorInfo
from qtool.convert.files.wrappers import is_wrapped

# how names begin -> what stands in their place: transformers 5's and transformers 4's files
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}


def text_names(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Stored tensors under the names that the text model alone has; others keep theirs. ``config``: as it is stored.
    Raises QtoolError for two that would have one name."""
    if not is_wrapped(config):
        return dict(tensors)
    nested = any(name.startswith("model.language_model.") for name in tensors)
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        begins = next((old for old in _PREFIXES if name.startswith(old)), "model." if nested else "")
        # towers lose the model's prefix, where they have it
        known = _PREFIXES.get(begins, "") + name.removeprefix(begins)
        if known in found:
            both = f"{shown(name)} and {shown(found[known].stored_as(known))}"
            raise QtoolError(f"{info.file}: holds {both}, which are one tensor of the text model, {shown(known)}. "
                             "Remove the one that is not meant.")  # fmt: skip
        found[known] = info if known == name else info.named(name)
    return dict(sorted(found.items()))
