"""Texts without the folders of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml


def without_folders(data: Any) -> Any:
    """JSON in which every text that is an absolute path is its last part: where it lay on this machine is nobody's
    business."""
    if isinstance(data, dict):
        return {key: without_folders(value) for key, value in data.items()}
    if isinstance(data, list):
        return [without_folders(value) for value in data]
    return _last_part(data) if isinstance(data, str) and _is_absolute(data) else data


def recipe_without_folders(text: str) -> str:
    """The recipe as it was written, comments and all, its absolute paths reduced to their last part."""
    for path in sorted(set(_texts(yaml.safe_load(text))), key=len, reverse=True):
        if _is_absolute(path):  # where it stands alone: `/data` is no part of `corpora/data/x.jsonl`
            text = re.sub(rf"(?<![\w./~:-]){re.escape(path)}(?![\w./-])", _last_part(path), text)
    return re.sub(r"(?<=[\s\"'\[{,])~?/(?:[^/\s\"',\]}]+/)+(?=[^/\s])", "", text)


def _texts(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict | list):
        for value in data.values() if isinstance(data, dict) else data:
            yield from _texts(value)


def _is_absolute(text: str) -> bool:
    return "\n" not in text and re.match(r"(~?/|[A-Za-z]:\\)", text) is not None


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
