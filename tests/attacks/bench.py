"""Small good things to damage, and what an attack is."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SECRET = "hf_PLANTEDsecretTOKEN0123456789"
CANARY = "canary"  # a file beside the bench that code of an input would make
REFUSED = frozenset({2})
CHECKED = frozenset({1, 2})
TAKEN_OR_REFUSED = frozenset({0, 2})
LACKS = frozenset({2, 3})
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Bench:
    """``root`` holds `model` (one shard), `shards` (several), `text.txt`, `task.jsonl`, `artifacts/`, `runs/`."""

    root: Path

    @property
    def canary(self) -> Path:
        return self.root / CANARY

    def model(self, work: Path, name: str = "model") -> Path:
        """A copy to damage."""
        return Path(shutil.copytree(self.root / name, work / "model"))

    def artifact(self, work: Path, output: str = "awq") -> Path:
        """A copy to damage; `awq`, `gptq`, `ct`, `nf4` or `q8`."""
        return Path(shutil.copytree(self.root / "artifacts" / f"model-{output}", work / f"model-{output}"))

    def run(self, work: Path) -> Path:
        """A copy of the stored run and of what lies beside it; the folder of the run."""
        shutil.copytree(self.root / "runs", work / "runs")
        shutil.copytree(self.root / "artifacts", work / "artifacts")
        return next(path.parent for path in (work / "runs").glob("*/result.json"))

    def recipe(self, work: Path, **changes: Any) -> list[str]:
        """A recipe file and the command that runs it."""
        data: dict[str, Any] = {
            "model": str(self.root / "model"),
            "calibration": {"text": str(self.root / "text.txt"), "samples": 4, "length": 32},
            "outputs": [{"method": "nf4"}],
        }
        (work / "recipe.yaml").write_text(yaml.safe_dump(data | changes), encoding="utf-8")
        return ["run", "recipe.yaml"]

    def evaluate(self, model: Path | str, *more: str) -> list[str]:
        """The shortest evaluation of a model."""
        task = str(self.root / "task.jsonl")
        return ["evaluate", str(model), "--task", task, "--max-new-tokens", "4", "--limit", "1", *more]


Build = Callable[[Bench, Path], list[str]]


@dataclass(frozen=True)
class Attack:
    """``build(bench, work)`` writes the input into the empty folder ``work`` and returns the command's words.

    ``codes``: exit codes that are a good answer. ``names``: a refusal has to hold one of these words. ``leaks``: a text
    that must appear neither in the output nor in any file that the command wrote.
    """

    kind: str
    name: str
    build: Build
    codes: frozenset[int] = REFUSED
    names: tuple[str, ...] = ()
    leaks: str = SECRET

    @property
    def label(self) -> str:
        return f"{self.kind}: {self.name}"


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON object in place; what ``change`` returns, if anything, replaces it."""
    data = json.loads(path.read_text(encoding="utf-8"))
    changed = change(data)
    path.write_text(json.dumps(data if changed is None else changed), encoding="utf-8")


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return header, raw[8 + length :]


def write_header(path: Path, header: bytes | dict[str, Any], data: bytes) -> None:
    """A safetensors file with this header, whatever it says."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    body += b" " * (-len(body) % 8)
    path.write_bytes(struct.pack("<Q", len(body)) + body + data)


def sign(folder: Path) -> None:
    """Renew size and sha256 of every file in the manifest, as whoever made a file on purpose would."""
    from qtool.convert.files.folder import file_entries

    entries = {name: entry.model_dump() for name, entry in file_entries(folder).items()}
    edit_json(folder / "qtool.json", lambda data: data.update(files=entries))


def named(kind: str, table: Iterable[tuple[str, Build]], **more: Any) -> list[Attack]:
    """Attacks of one kind with the same good answers."""
    return [Attack(kind, name, build, **more) for name, build in table]
