"""A recipe's file, or what arguments say in its place, as a checked object: every fault at once, each with its path."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qtool import QtoolError
from qtool.recipe.faults import other_case, sentences
from qtool.recipe.yaml_file import read_yaml

Checked = TypeVar("Checked", bound=BaseModel)


def load(path: Path, kind: type[Checked]) -> Checked:
    """Read a recipe as ``kind``. Raises QtoolError listing every fault with its path in the file."""
    if not path.exists():
        raise QtoolError(f"{path}: No such file or directory. Check the path; the folder recipes/ has examples.")
    data = read_yaml(path)
    if not isinstance(data, dict):
        there = {type(None): "it is empty", list: "it is a list"}.get(type(data), "it is one value")
        raise QtoolError(f"{path}: a recipe is a mapping with `model:` and `outputs:`; {there}.")
    return checked(data, str(path), kind)


def checked(data: dict[str, Any], where: str, kind: type[Checked]) -> Checked:
    """``data`` as ``kind``; names that are right but for capitals are put right in it. Raises QtoolError listing every
    fault, ``where`` in front."""
    while True:
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            written_otherwise = other_case(error, kind)
            if not written_otherwise:
                faults = sentences(error, kind)
                raise QtoolError(f"{where}: {len(faults)} error(s) in the recipe\n" + "\n".join(faults)) from error
            for loc, value in written_otherwise:
                _put(data, loc, value)


def _put(data: Any, loc: tuple[int | str, ...], value: Any) -> None:
    for part in loc[:-1]:
        data = data[part]
    data[loc[-1]] = value


def digest_of(data: Any) -> str:
    """sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
