"""Names in a recipe that are relative: to the current folder, as typed; and what is said where they lie elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from qtool import QtoolError
from qtool.convert.files.reading import named
from qtool.convert.files.source import SHIPPED

if TYPE_CHECKING:
    from qtool.recipe.sections import Recipe

EDITORS = "# yaml-language-server:"  # how a line begins that tells an editor which schema holds
RECIPE_ENDS = (".yaml", ".yml")


def require_paths(recipe: Recipe, path: Path) -> None:
    """Refuse names that lie beside the recipe but not where they are typed: they are relative to the current folder.

    Raises QtoolError naming both places; for a model also where it is at neither and is no Hub id.
    """
    folder = path.absolute().parent
    if folder == Path.cwd():
        return
    for key, text in _paths(recipe):
        typed = named(text)
        if typed.is_absolute() or typed.exists():
            continue
        beside, here = folder / typed, Path.cwd() / typed
        if os.path.lexists(beside):
            raise QtoolError(
                f"{path}: `{key}` {text!r} is relative to the current folder, where there is none ({here}); there is "
                f"one beside the recipe. Write {os.path.relpath(beside)!r}, or run qtool in {folder}."
            )
        if key == "model" and (text.startswith(".") or text.count("/") != 1):
            raise QtoolError(
                f"{path}: `model` {text!r} is relative to the current folder, where there is no {here}; nor is there "
                f"one beside the recipe ({beside}); and it is no Hub id (org/name). Check the path."
            )


def _paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Everything in a recipe that may be the path of something to read."""
    if recipe.model.id not in SHIPPED:
        yield "model", recipe.model.id
    yield "calibration.text", recipe.calibration.text
    if recipe.evaluate.text is not None:
        yield "evaluate.text", recipe.evaluate.text.text
    if recipe.evaluate.long is not None:
        yield "evaluate.long", recipe.evaluate.long.text
    for task in recipe.evaluate.tasks:
        yield "evaluate.tasks", task.file or task.task
    for output in recipe.outputs:
        if isinstance(imatrix := getattr(output, "imatrix", None), str):
            yield "imatrix", imatrix


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that ships with qtool, by name."""
    entries = [Path(str(entry)) for entry in files("qtool.recipes").iterdir()]
    return {path.stem: path for path in sorted(entries, key=lambda path: path.stem) if path.suffix in RECIPE_ENDS}


def about(path: Path) -> str:
    """What a recipe says of itself: the first sentence of its first comment; the line for editors is none."""
    said = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.startswith("#   "):
            break
        said += [] if line.startswith(EDITORS) else [line[1:].strip()]
    return re.split(r"(?<=[^.])\.(?: |$)", " ".join(said))[0]


def locate(typed: Path) -> Path:
    """The recipe's file: as typed, or of those that ship with qtool the one of that name (`demo`, `recipes/demo.yaml`).

    Raises QtoolError naming the shipped ones where it is neither.
    """
    if os.path.lexists(typed) and not typed.is_dir():
        return typed
    shipped = shipped_recipes()
    name = typed.stem if typed.suffix in RECIPE_ENDS else typed.name  # a name may hold a dot: qwen2.5-coder-32b
    if typed.parent in (Path("."), Path("recipes")) and name in shipped:
        return shipped[name]
    there = "a folder, not a recipe" if typed.is_dir() else "No such file or directory"
    raise QtoolError(
        f"{typed}: {there}. Check the path. Recipes that ship with qtool go by name: {', '.join(shipped)}."
    )
