"""Where a folder lies, seen from another. A link may be on the way: its `..` leads elsewhere than its name says."""

from __future__ import annotations

import os
from pathlib import Path


def path_from(folder: Path, other: Path) -> str:
    """``other`` relative to ``folder``, so that ``folder / path`` is it."""
    path = os.path.relpath(other, folder)
    if (folder / path).exists() and (folder / path).samefile(other):
        return path
    return os.path.relpath(other.resolve(), folder.resolve())


def as_typed(path: Path) -> Path:
    """As a person here would type it: relative where it lies below the current folder."""
    relative = Path(os.path.relpath(path))
    if path.exists() and not (relative.exists() and relative.samefile(path)):
        relative = Path(os.path.relpath(path.resolve()))
    return path.resolve() if relative.parts[:1] == ("..",) else relative
