"""What a model's own card and LICENSE file say of its licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qtool import QtoolError
from qtool.convert.files.reading import CONFIG_LIMIT, leaves_folder, read_bytes
from qtool.convert.files.sidecars import without_private_paths

KEYS = ("license", "license_name", "license_link", "base_model")
_HEADS = {  # how the text of a well-known licence begins, spaces folded
    "apache-2.0": r"apache license version 2\.0",
    "mit": r"(the )?mit license",
}
_NO_DERIVATIVES = re.compile(r"(^|-)nd(-|$)")


@dataclass(frozen=True)
class Licence:
    """``id`` as the Hub spells it; ``name`` and ``link`` belong to `other`. ``base_model``: what the source itself was
    made from."""

    id: str
    name: str | None = None
    link: str | None = None
    base_model: str | None = None


def read_licence(folder: Path) -> dict[str, str]:
    """Licence keys of a model folder's README.md metadata; else of a LICENSE file whose text is known. Only what is
    said is in the result: no guess."""
    said = {key: value for key, value in card_metadata(folder).items() if key in KEYS and isinstance(value, str)}
    found: dict[str, str] = without_private_paths(said)
    if "license" not in found:
        for path in sorted(folder.glob("LICENSE*")):
            text = " ".join(_text(folder, path)[:500].lower().split())
            known = next((name for name, head in _HEADS.items() if re.match(head, text)), None)
            if known:
                return found | {"license": known}
    return found


def card_metadata(folder: Path) -> dict[str, Any]:
    """The YAML on top of README.md; empty where there is none, or it is no YAML mapping."""
    text = _text(folder, folder / "README.md").lstrip()
    match = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, re.S)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date in month 13
        return {}
    return data if isinstance(data, dict) else {}


def _text(folder: Path, path: Path) -> str:
    """Empty for what is no regular file of this folder, or no card: nothing is said then."""
    if not path.is_file() or leaves_folder(folder, path):
        return ""
    try:
        return read_bytes(path, CONFIG_LIMIT).decode("utf-8", "replace")
    except QtoolError:
        return ""


def licence_fault(said: Mapping[str, Any], has_file: bool) -> str | None:
    """Why weights made from a model with this licence must not be published, or None. ``has_file``: a LICENSE file
    travels with them. No legal advice: it stops what the licence's own name forbids, and what nobody stated."""
    name = str(said.get("license") or "unknown").lower()
    if name == "unknown":
        return "the source's licence is unknown: neither its card nor a LICENSE file says it"
    if _NO_DERIVATIVES.search(name):
        return f"the source's licence {name} forbids to share modified versions, and a quantized model is one"
    if name == "other" and not said.get("license_name"):
        return "the source's licence is `other` without a license_name"
    if name == "other" and not said.get("license_link") and not has_file:
        return "the source's licence is `other` with neither a license_link nor a LICENSE file"
    return None


def licence_of(said: Mapping[str, Any]) -> Licence:
    """The keys as one value; call it where `licence_fault` found none."""
    return Licence(str(said["license"]), said.get("license_name"), said.get("license_link"), said.get("base_model"))
