"""The small files of a model's folder: which belong to the model, and what they may say of a machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qtool.convert.files.config_file import CONFIG
from qtool.convert.files.reading import CONFIG_LIMIT, MB, TOKENIZER_LIMIT, open_file, read_bytes, refuse_link

# What loaders read beside config.json and the weights. Trainers, adapters and loggers leave other files in a model's
# folder, some with names of people and machines, and with PEFT installed an adapter_config.json changes what is loaded.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tekken.json", "*.model", "*.tiktoken",
)  # fmt: skip
SIDECARS = (
    *TOKENIZER, "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*",
)  # fmt: skip
LEGAL_LIMIT = 4 * MB
PATH_MAX = 4096
_ELSEWHERE = re.compile(r"~/|\.\.?/|file:/|[A-Za-z]:[/\\]|\\\\")  # a home, beside us, a drive, a server
# the model's own weights and what is made anew for an artifact: left behind without a word
_EXPECTED = ("*.safetensors", "*.index.json", CONFIG, "README.md", "*.gguf", "*.bin", "*.pt", "*.pth", "*.py")
# JSON with settings; the others hold a vocabulary, in which a path may well be a token
_SETTINGS = ("tokenizer_config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
_TEXTS = re.compile(r"(content|chat_template|.*_tokens?)")  # keys whose value is text of the model


def sidecars(folder: Path, with_code: bool = False) -> Iterator[Path]:
    """Files that belong to the model. Raises QtoolError for one that is a link out of the folder, no regular file, or
    larger than such a file can be."""
    for pattern in (*SIDECARS, "*.py") if with_code else SIDECARS:
        found = sorted(folder.glob(pattern)) if "*" in pattern else [folder / pattern]
        for path in found:  # glob passes over a link that leads nowhere
            if not os.path.lexists(path) or (path.is_dir() and "*" in pattern):
                continue
            refuse_link(folder, path)
            limit = TOKENIZER_LIMIT if pattern in TOKENIZER else CONFIG_LIMIT if path.suffix else LEGAL_LIMIT
            open_file(path, limit).close()
            yield path


def check_sidecars(folder: Path, with_code: bool = False) -> None:
    """Raises QtoolError as `sidecars` does, before a library opens one of them."""
    for _ in sidecars(folder, with_code):
        pass


def left_out(folder: Path, with_code: bool = False) -> list[str]:
    """Names of files that stay behind, sorted: whoever knows what one is for may want it."""
    carried = set(sidecars(folder, with_code))
    known = {path for pattern in _EXPECTED for path in folder.glob(pattern)}
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and not p.is_dir()
                  and p not in carried | known)  # fmt: skip


def carried_bytes(path: Path) -> bytes:
    """A sidecar as it goes into an artifact: byte for byte, but for private paths in a file of settings."""
    data = read_bytes(path, TOKENIZER_LIMIT)
    if path.name not in _SETTINGS:
        return data
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return data  # whoever reads it says so
    for old in sorted(set(_private(said)), key=len, reverse=True):
        for spelled in {json.dumps(old), json.dumps(old, ensure_ascii=False)}:
            data = data.replace(spelled.encode(), json.dumps(last_part(old), ensure_ascii=False).encode())
    if not any(_private(json.loads(data))):
        return data
    return json.dumps(without_private_paths(said), indent=2, ensure_ascii=False).encode()  # odd escapes: written anew


def without_private_paths(data: Any, key: str = "") -> Any:
    """JSON of a model's settings in which every path of a machine is its last part."""
    if isinstance(data, dict):
        return {name: without_private_paths(value, name) for name, value in data.items()}
    if isinstance(data, list):
        return [without_private_paths(value, key) for value in data]
    return last_part(data) if isinstance(data, str) and _is_private(data, key) else data


def _private(data: Any, key: str = "") -> Iterator[str]:
    if isinstance(data, str):
        if _is_private(data, key):
            yield data
    elif isinstance(data, dict):
        for name, value in data.items():
            yield from _private(value, name)
    elif isinstance(data, list):
        for value in data:
            yield from _private(value, key)


def _is_private(text: str, key: str) -> bool:
    """A path of at least two parts, so that a word like `/think` stays."""
    if len(text) > PATH_MAX or "\n" in text or _TEXTS.fullmatch(key):
        return False
    absolute = text.startswith("/") and "/" in text.rstrip("/")[1:]
    return absolute or _ELSEWHERE.match(text) is not None


def last_part(path: str) -> str:
    """The name at the end of a path of any system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
