"""Where each model stands, as the records of its runs and the journals of its artifacts tell it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.batch.models import Asked
from qtool.convert.files.folder import PARTIAL
from qtool.convert.files.manifest import MANIFEST
from qtool.convert.files.reading import read_text
from qtool.runs import ledger
from qtool.runs.record import RECIPE
from qtool.runs.shelf import Entry, entries

NOT_BEGUN, BEGUN = "not begun", "not finished"


@dataclass(frozen=True)
class State:
    """``state``: as `qtool runs` says it, or that nothing was begun. ``artifacts``: output -> what is there of it."""

    name: str
    run: str
    state: str
    artifacts: Mapping[str, str]
    seconds: float | None = None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end, whatever its gates said."""
        return self.state not in (NOT_BEGUN, BEGUN, "unreadable")


def states_of(asked: Sequence[Asked], runs: Path) -> list[State]:
    """One for each model, in the list's order."""
    there = entries(runs)
    logged = {str(entry.get("run")): entry for entry in ledger.read(runs)}
    return [_state(one, there, logged) for one in asked]


def _state(asked: Asked, there: Sequence[Entry], logged: Mapping[str, Mapping[str, Any]]) -> State:
    entry = next((one for one in reversed(there) if _same(one, asked)), None)
    grown = {name: _grown(folder) for name, folder in asked.folders().items()}
    if entry is None:
        there_is = {name: said for name, said in grown.items() if said}
        return State(asked.name, "", BEGUN if there_is else NOT_BEGUN, there_is)
    told = logged.get(entry.id, {})
    made = {name: _made(name, told) for name in entry.models} if entry.seconds is not None else grown
    return State(asked.name, entry.id, entry.state, {name: said for name, said in made.items() if said}, entry.seconds)


def _same(entry: Entry, asked: Asked) -> bool:
    """Whether a run is this model's: by its recipe's digest, or, where the work took more text than the recipe says
    (experts), by the recipe's text."""
    if entry.id == asked.recipe.digest[:16]:
        return True
    file = entry.folder / RECIPE
    return entry.name == asked.name and file.is_file() and read_text(file) == asked.text


def _grown(folder: Path) -> str:
    """`finished`, how many layers are written and when the last was, or nothing."""
    if (folder / MANIFEST).is_file():
        return "finished"
    journals = list(folder.with_name(folder.name + PARTIAL).glob("*journal.jsonl"))
    if not journals:
        return ""
    layers = min(max(0, path.read_bytes().count(b"\n") - 1) for path in journals)
    ago = time.time() - max(path.stat().st_mtime for path in journals)
    return f"{layers} layers, {ago / 60:.0f} min ago"


def _made(name: str, told: Mapping[str, Any]) -> str:
    """Bits and KL of an output, by the ledger."""
    artifact = (told.get("artifacts") or {}).get(name) or {}
    kl = (told.get("kl") or {}).get(name)
    said = [f"{artifact['bpw']:.2f} bpw"] if isinstance(artifact.get("bpw"), int | float) else []
    return ", ".join([*said, *([f"KL {kl:.4f}"] if isinstance(kl, int | float) else [])])
