"""The folder of job files: written whole, never over somebody else's files, never with a secret in it; and started."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from qtool import QtoolError
from qtool.batch.engine import Engine, Place, Rendered, Task
from qtool.convert.files.reading import shown
from qtool.recipe.section import Section

INDEX = "batch.json"  # says that the folder is one of ours, and what is in it
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}|://[^/\s:@'\"]+:[^/\s@'\"]+@")


def render(engine: Engine, tasks: Sequence[Task], place: Place, section: Section) -> Rendered:
    """Job files and every recipe. Raises QtoolError where a secret would stand in one of them."""
    made = engine.render(tasks, place, section)
    files = {**{task.file: task.recipe for task in tasks}, **made.files}
    for name, text in files.items():
        _refuse_secrets(name, text, os.environ)
    return Rendered(files, made.start)


def _refuse_secrets(name: str, text: str, environment: Mapping[str, str]) -> None:
    there = [key for key in SECRETS if len(environment.get(key, "")) > 7 and environment[key] in text]
    if there or _TOKEN.search(text):
        what = f"the value of {there[0]}" if there else "a token or a password"
        raise QtoolError(
            f"{name}: {what} would stand in it. Take it out of the recipe; jobs find {SECRETS[0]} themselves."
        )


def write(made: Rendered, folder: Path) -> list[Path]:
    """Files of an earlier list that this one has not go. Raises QtoolError for a folder that is somebody else's, or
    cannot be written."""
    try:
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise QtoolError(f"{shown(folder)}: is no folder; name another with --out.")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / INDEX).is_file():
            raise QtoolError(f"{shown(folder)}: holds other files than `qtool batch`'s; name another with --out.")
        folder.mkdir(parents=True, exist_ok=True)
        for name in _listed(folder / INDEX):
            if name not in made.files:
                (folder / name).unlink(missing_ok=True)
        (folder / INDEX).write_text(json.dumps({"files": sorted(made.files)}, indent=1) + "\n", encoding="utf-8")
        for name, text in made.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise QtoolError(f"{shown(folder)}: cannot be written ({error.strerror}).", exit_code=3) from error
    return [folder / name for name in made.files]


def _listed(index: Path) -> list[str]:
    """Names in the folder's index that can only be below it."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if isinstance(name, str) and re.fullmatch(r"(recipes/)?[A-Za-z0-9][\w.-]*", name)]


def start(engine: Engine, made: Rendered, folder: Path) -> int:
    """Give the commands; the first exit code that is not 0. Raises QtoolError (exit 3) where the engine's program is
    missing."""
    if shutil.which(engine.program) is None and shutil.which(made.start[0][0]) is None:
        raise QtoolError(f"{engine.name}: there is no `{engine.program}` here ({engine.install}).", exit_code=3)
    code = 0
    for words in made.start:
        # the engine's own program, as its user would start it: with his logins
        code = code or subprocess.run(words, cwd=folder, env=dict(os.environ), check=False).returncode
    return code
