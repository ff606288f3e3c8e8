"""Pipes, sockets, devices and folders where a file should be, for every file that some command opens."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.bench import Attack, Bench, edit_json

MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
ARTIFACT_FILES = ("model.safetensors", "config.json", "tokenizer.json", "qtool.json", "qtool/fold_scales.safetensors")


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a folder": os.mkdir,
    "unreadable text": lambda path: path.symlink_to("/proc/self/mem"),
}


def _instead(path: Path, make: Callable[[Path], Any]) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    make(path)


def _model(file: str, make: Callable[[Path], Any], command: str) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        model = bench.model(work)
        _instead(model / file, make)
        if command == "evaluate":
            return bench.evaluate(model)
        return ["plan", str(model)] if command == "plan" else bench.recipe(work, model=str(model))

    return build


def _artifact(file: str, make: Callable[[Path], Any], command: str) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        folder = bench.artifact(work)
        _instead(folder / file, make)
        if command == "verify":
            return ["verify", str(folder)]
        return ["publish", str(folder), "--to", "acme", "--license", "mit", "--dry-run"]

    return build


def _entry(make: Callable[[Path], Any]) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        folder = bench.artifact(work)
        make(folder / "special")
        edit_json(folder / "qtool.json", lambda data: data["files"].update(special={"bytes": 0, "sha256": "0" * 64}))
        return ["verify", str(folder)]

    return build


def _word(words: list[str], make: Callable[[Path], Any]) -> Callable[[Bench, Path], list[str]]:
    """A special file that the command line itself names: FILE in ``words``."""

    def build(bench: Bench, work: Path) -> list[str]:
        make(work / "special")
        if "latest" in words:
            bench.run(work)
        places = {"FILE": str(work / "special"), "MODEL": str(bench.root / "model")}
        return [places.get(word, word) for word in words]

    return build


WORDS: list[list[str]] = [
    ["run", "FILE"],
    ["evaluate", "MODEL", "--task", "FILE"],
    ["check", "latest", "--baseline", "FILE"],
    ["check", "latest", "--recipe", "FILE"],
    ["compare", "FILE", "latest"],
]


def attacks() -> list[Attack]:
    found = []
    for number, (kind, make) in enumerate(KINDS.items()):
        for place, file in enumerate(MODEL_FILES):
            command = ("run", "evaluate", "plan")[(number + place) % 3]
            codes = frozenset({0, 2}) if file.startswith(("tokenizer", "generation")) else frozenset({2})
            found.append(Attack("special file", f"{kind} as {file}, {command}", _model(file, make, command), codes))
        for place, file in enumerate(ARTIFACT_FILES):
            command = ("verify", "publish")[(number + place) % 2]
            build = _artifact(file, make, command)
            found.append(
                Attack("special file", f"{kind} as the artifact's {file}, {command}", build, frozenset({1, 2}))
            )
        found.append(Attack("special file", f"{kind} in the manifest", _entry(make), frozenset({1, 2})))
        for words in WORDS:
            label = " ".join(words)
            found.append(Attack("special file", f"{kind}: {label}", _word(words, make), frozenset({2, 3})))
    return found
