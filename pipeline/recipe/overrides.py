"""`--set outputs.0.group_size=64`: values put into a recipe by path, before it is checked as any recipe is."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from qtool import QtoolError
from qtool.recipe.yaml_file import parse_yaml

Overrides = Mapping[str, Any]
NONE: Overrides = {}
LONGEST = 20  # parts of a path; a recipe is five deep


def parse_overrides(typed: Sequence[str]) -> dict[str, Any]:
    """``("outputs.0.group_size=64",)`` -> ``{"outputs.0.group_size": 64}``; values are YAML. ``outputs[0].bits``, as
    faults write it, is taken, too. Raises QtoolError naming what has no path, or is no YAML."""
    found: dict[str, Any] = {}
    for one in typed:
        path, equals, text = one.partition("=")
        if not equals:
            raise _no_path(one)
        path = path_of(path, one)
        found[path] = parse_yaml(text, f"--set {path}")
    return found


def path_of(typed: str, shown: str) -> str:
    """``outputs[0].bits`` -> ``outputs.0.bits``. Raises QtoolError showing ``shown`` where it is no path."""
    path = typed.strip().replace("[", ".").replace("]", "")
    if not all(path.split(".")) or path.count(".") >= LONGEST:
        raise _no_path(shown)
    return path


def _no_path(shown: str) -> QtoolError:
    return QtoolError(f"--set {shown:.200}: write PATH=VALUE, for example outputs.0.group_size=64.")


def apply_overrides(data: Any, overrides: Overrides) -> None:
    """Put each value at its path of ``data``; sections that are missing are made, a list grows by one at its end.
    Raises QtoolError naming the path, and what stands there instead."""
    for path, value in overrides.items():
        *way, last = path.split(".")
        here = data
        for number, part in enumerate(way):
            here = _section(
                here, part, path, ".".join(way[: number + 1]), index_next=_is_index([*way, last][number + 1])
            )
        _put(here, last, path, value)


def text_of(text: str, overrides: Overrides, data: Any) -> str:
    """A recipe's text with ``overrides`` in it, for the record: as it was written where there are none. The paths of
    what was set stand in its first line, their values in their places."""
    if not overrides:
        return text
    said = f"# as written, but for --set {', '.join(overrides)}; without its comments\n"
    return said + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def _section(here: Any, part: str, path: str, above: str, index_next: bool) -> Any:
    """What stands at ``part``, made where there is nothing yet."""
    if above == "model" and isinstance(here, dict) and isinstance(here.get(part), str):
        here[part] = {"id": here[part]}  # `model: name` is short for that
    fresh: Any = [] if index_next else {}
    if isinstance(here, list):
        number = _index(here, part, path)
        if number == len(here):
            here.append(fresh)
        found = here[number]
    elif isinstance(here, dict):
        if here.get(part) is None:
            here[part] = fresh
        found = here[part]
    else:
        raise QtoolError(f"--set {path}: {above.rpartition('.')[0]!r} is one value ({here!r:.60}); it has no keys.")
    if not isinstance(found, dict | list):
        raise QtoolError(f"--set {path}: {above!r} is one value ({found!r:.60}); it has no keys.")
    return found


def _put(here: Any, last: str, path: str, value: Any) -> None:
    if isinstance(here, dict):
        here[last] = value
        return
    number = _index(here, last, path)
    here[number:] = [value, *here[number + 1 :]]


def _index(here: list[Any], part: str, path: str) -> int:
    """Of an entry, or of the place behind the last; an output's name is one, too."""
    names = [str(entry.get("name") or entry.get("method")) if isinstance(entry, dict) else "" for entry in here]
    if part in names:
        return names.index(part)
    if _is_index(part) and int(part) <= len(here):
        return int(part)
    meant = difflib.get_close_matches(part, names, 1, 0.6)
    hint = f"; did you mean {meant[0]!r}?" if meant else "."
    last = f"0 to {len(here) - 1}, {len(here)} adds one" if here else "empty; 0 adds the first"
    raise QtoolError(f"--set {path}: {part!r} is no entry of that list ({last}){hint}")


def _is_index(part: str) -> bool:
    return part.isdecimal() and len(part) < 6
