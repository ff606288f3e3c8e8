"""`qtool.json`, the manifest of an artifact: what is in its folder, how it was made, what each linear lost.

Nobody signs it: it tells what its maker says. Whoever checks an artifact looks at the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qtool import QtoolError
from qtool.convert.files.proof import Proof
from qtool.convert.files.reading import read_json, shown

MANIFEST = "qtool.json"
Count = Annotated[int, Field(ge=0, lt=2**63)]
Figure = Annotated[float, Field(ge=0)]
FREE_TEXT = ("name", "model", "text", "commit")  # where "nan" may be what somebody calls a thing


class _Stored(BaseModel):
    """Numbers are numbers, and finite: `"Infinity"` is not 0.1, and NaN compares with nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileEntry(_Stored):
    """One file of an artifact."""

    bytes: Count
    sha256: str


class Manifest(_Stored):
    """What is in the folder, how it was made, what each linear lost, and the servers that it was proved in."""

    qtool: str
    key: str
    output: dict[str, Any]
    source: dict[str, Any]
    calibration: dict[str, Any]
    device: str
    versions: dict[str, str]
    parameters: Count
    tensor_bytes: Count
    bits_per_weight: Annotated[float, Field(ge=0, le=64)]
    ledger: dict[str, dict[str, Figure]]
    files: dict[str, FileEntry]
    notes: list[str] = []
    proofs: list[Proof] = []

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if fault := name_fault(name):
                raise ValueError(f"names a file {fault} ({shown(name)}). Do not trust it")
        return files

    @field_validator("output", "source", "calibration")
    @classmethod
    def _real(cls, said: dict[str, Any]) -> dict[str, Any]:
        for key, value in _leaves(said):
            if isinstance(value, str | float) and key not in FREE_TEXT and _not_finite(value):
                raise ValueError(f"{shown(key)} is {shown(str(value))}, which is no finite number")
        return said

    @property
    def file_bytes(self) -> int:
        """Size of the whole folder, without the manifest itself."""
        return sum(entry.bytes for entry in self.files.values())


def read_manifest(path: Path) -> Manifest:
    """`qtool.json` of a folder. Raises QtoolError naming the file and the first fault, a file outside the folder among
    them."""
    file = path / MANIFEST
    try:
        return Manifest.model_validate(read_json(file, strict=True))
    except ValidationError as error:
        fault = error.errors()[0]
        place = shown(".".join(map(str, fault["loc"])))
        raise QtoolError(f"{file}: not a manifest this qtool understands ({place}: {fault['msg']}).") from error


def name_fault(name: str) -> str | None:
    """What is wrong with a manifest's name for a file, None for a plain path below the folder that every system reads
    alike."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive:
        return "outside its folder"
    if not name or str(path) != name or name in (".", MANIFEST):
        return "that is none of its folder"
    if "\\" in name or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name):
        return "whose name is not plain"
    return None


def _leaves(said: Any) -> Iterator[tuple[str, Any]]:
    """(the key it stands under, value) of everything in nested JSON that is no container."""
    rest: list[tuple[str, Any]] = [("", said)]
    while rest:
        key, value = rest.pop()
        if isinstance(value, dict):
            rest += value.items()
        elif isinstance(value, list):
            rest += [(key, item) for item in value]
        else:
            yield key, value


def _not_finite(value: str | float) -> bool:
    try:
        return not math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False  # a text
