"""Linears that an output stores otherwise than the rest: in 16 bits, or with settings of their own.

One mapping says it, made once from what a recipe asks for by name or pattern: `Apart`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from qtool import QtoolError

Settings = Mapping[str, Any]
"""Of a linear, under the names that a recipe has for them: ``group_size``, ``bits``, ``type``."""
Apart = Mapping[str, Settings | None]
"""Full module -> its own settings, None where it stays in 16 bits. A linear that is not named is stored as the rest."""


def find_apart(asked: Mapping[str, Any], linears: Sequence[str]) -> dict[str, Settings | None]:
    """What ``ignore`` and ``modules`` of an output mean for these linears; ``asked``: its section, as its manifest has
    it. Of several patterns in ``modules`` the last one decides; what is ignored has no settings.

    Raises QtoolError for a pattern that names none of them, and where nothing would be quantized.
    """
    found: dict[str, Settings | None] = {}
    for pattern, said in (asked.get("modules") or {}).items():
        own = {key: value for key, value in said.items() if value is not None}
        found |= dict.fromkeys(matched("modules", pattern, linears), own)
    for pattern in asked.get("ignore") or ():
        found |= dict.fromkeys(matched("ignore", pattern, linears))
    if linears and all(found.get(linear, {}) is None for linear in linears):
        raise QtoolError("ignore: names every linear, so that nothing would be quantized.")
    return {linear: found[linear] for linear in linears if linear in found}


def matched(key: str, pattern: str, linears: Sequence[str]) -> list[str]:
    """The linears whose name, or the end of it behind a dot, is ``pattern``; `*` stands for anything. Raises QtoolError
    where there is none."""
    found = [linear for linear in linears if fnmatchcase(linear, pattern) or fnmatchcase(linear, f"*.{pattern}")]
    if found:
        return found
    last = pattern.rpartition(".")[2]
    if last == "lm_head" and (embeddings := [linear for linear in linears if linear.endswith("embed_tokens")]):
        raise QtoolError(f"{key}: this model's lm_head is its embeddings (tied); name {embeddings[0]}.")
    if last in ("lm_head", "embed_tokens"):
        raise QtoolError(f"{key}: {pattern} stays in 16 bits in this format as it is; leave it out.")
    kinds = list(dict.fromkeys(linear.rpartition(".")[2] for linear in linears))
    near = get_close_matches(pattern.rpartition(".")[2], kinds, 1)
    hint = f" Did you mean {near[0]!r}?" if near and near[0] not in pattern else ""
    named = f"such as {linears[0]}, kinds {', '.join(kinds)}" if linears else "none"
    raise QtoolError(f"{key}: {pattern!r} names no linear of this model, whose linears are {named}.{hint}")


def require_alike(apart: Apart, groups: Iterable[Sequence[str]], why: str) -> None:
    """Raises QtoolError naming two linears of a group that are not stored alike; ``why`` they have to be."""
    for group in groups:
        for linear in group[1:]:
            first, other = (apart.get(name, {}) for name in (group[0], linear))
            if first != other:
                raise QtoolError(f"{group[0]} {_told(first)} and {linear} {_told(other)}: {why}. Name both alike.")


def only_ignored(apart: Apart, whose: str) -> list[str]:
    """The linears that stay in 16 bits. Raises QtoolError where one has settings: ``whose`` files cannot say them."""
    for linear, settings in apart.items():
        if settings is not None:
            raise QtoolError(f"{linear} has settings of its own, which {whose} files cannot say.")
    return list(apart)


def _told(settings: Settings | None) -> str:
    if settings is None:
        return "stays in 16 bits"
    said = ", ".join(f"{key} {value}" for key, value in settings.items())
    return f"has {said}" if said else "is stored as the rest"
