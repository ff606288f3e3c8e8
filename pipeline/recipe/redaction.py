"""Texts without the folders of this machine and the servers of its network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

NEUTRAL = "http://127.0.0.1:8000/v1"  # stands for a server of one's own, whose address may even hold a password


def without_folders(data: Any) -> Any:
    """JSON in which every text that is an absolute path is its last part, and `base_url` a neutral one: where things
    lay here is nobody's business."""
    if isinstance(data, dict):
        return {k: NEUTRAL if k == "base_url" and v is not None else without_folders(v) for k, v in data.items()}
    if isinstance(data, list):
        return [without_folders(value) for value in data]
    return _last_part(data) if isinstance(data, str) and _is_absolute(data) else data


def recipe_without_folders(text: str) -> str:
    """The recipe as it was written, comments and all, its absolute paths reduced to their last part, the address of its
    server to a neutral one."""
    data = yaml.safe_load(text)
    for path in sorted(set(_texts(data)), key=len, reverse=True):
        if _is_absolute(path):  # where it stands alone: `/data` is no part of `corpora/data/x.jsonl`
            last = _last_part(path).replace("\\", "\\\\")
            text = re.sub(rf"(?<![\w./~:-]){re.escape(path)}(?![\w./-])", last, text)
    evaluate = data.get("evaluate") if isinstance(data, dict) else None
    if isinstance(evaluate, dict) and isinstance(evaluate.get("base_url"), str):
        text = text.replace(evaluate["base_url"], NEUTRAL)
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
