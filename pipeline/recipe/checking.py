"""A recipe's file, or what arguments say in its place, as a checked object: every fault at once, each with its path."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qtool import QtoolError
from qtool.recipe.faults import other_case, sentences
from qtool.recipe.overrides import NONE, Overrides, apply_overrides
from qtool.recipe.yaml_file import read_yaml

Checked = TypeVar("Checked", bound=BaseModel)


def load(path: Path, section: type[Checked], overrides: Overrides = NONE) -> Checked:
    """Read a recipe as ``section``, with ``overrides`` in it. Raises QtoolError listing every fault with its path in
    the file."""
    where = f"{path.name} with --set {', '.join(overrides)}" if overrides else str(path)
    return checked(read(path, overrides), where, section)


def read(path: Path, overrides: Overrides = NONE) -> dict[str, Any]:
    """What a recipe's file says, with ``overrides`` in it, not yet checked. Raises QtoolError."""
    if not path.exists():
        raise QtoolError(f"{path}: No such file or directory. Check the path; `qtool recipes` lists examples.")
    data = read_yaml(path)
    if not isinstance(data, dict):
        there = {type(None): "it is empty", list: "it is a list"}.get(type(data), "it is one value")
        raise QtoolError(f"{path}: a recipe is a mapping with `model:` and `outputs:`; {there}.")
    apply_overrides(data, overrides)
    return data


def checked(data: dict[str, Any], where: str, section: type[Checked], what: str = "recipe") -> Checked:
    """``data`` as ``section``; names right but for capitals are put right in it. Raises QtoolError listing every
    fault, ``where`` in front. ``what``: the file, in a word."""
    while True:
        try:
            return section.model_validate(data)
        except ValidationError as error:
            written_otherwise = other_case(error, section)
            if not written_otherwise:
                faults = sentences(error, section)
                if len(faults) == 1:
                    raise QtoolError(f"{where}: {faults[0].strip()}") from error
                raise QtoolError(f"{where}: {len(faults)} errors in the {what}\n" + "\n".join(faults)) from error
            for loc, value in written_otherwise:
                _put(data, loc, value)


def _put(data: Any, loc: tuple[int | str, ...], value: Any) -> None:
    for part in loc[:-1]:
        data = data[part]
    data[loc[-1]] = value


def digest_of(data: Any) -> str:
    """sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
