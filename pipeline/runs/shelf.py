"""All runs of one folder: which there are and what became of them, their names, how one is found and removed."""

from __future__ import annotations

import datetime
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qtool import QtoolError
from qtool.convert.files.durable import naming, write_whole
from qtool.convert.files.reading import read_text
from qtool.recipe.yaml_file import parse_yaml
from qtool.runs import ledger
from qtool.runs.record import INDEX, LOCK, RECIPE, RESULT, Lock, Result, alone, load_index, read_part

NAME = "name"  # the file in a run's folder that has it
LATEST = "latest"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
State = Literal["passed", "failed", "undecided", "no gates", "not finished", "evaluation", "unreadable"]


@dataclass(frozen=True)
class Entry:
    """One run, or an evaluation. ``models``: outputs of a run, all that an evaluation scored; ``seconds`` and
    ``finished`` are None where it is not finished."""

    folder: Path
    name: str
    model: str
    models: tuple[str, ...]
    state: State
    finished: datetime.datetime | None
    seconds: float | None

    @property
    def id(self) -> str:
        return self.folder.name

    def fits(self, words: Sequence[str]) -> bool:
        """Whether each word stands in its id, name, model, outputs or state."""
        text = " ".join([self.id, self.name, self.model, *self.models, self.state]).lower()
        return all(word.lower() in text for word in words)


def entries(runs: Path) -> list[Entry]:
    """Every run and evaluation in ``runs``, the newest last."""
    folders = [path for path in runs.iterdir() if path.is_dir()] if runs.is_dir() else []
    kept = [path for path in folders if any((path / name).is_file() for name in (RECIPE, INDEX))]
    return [_entry(path) for path in sorted(kept, key=lambda path: (_touched(path), path.name))]


def _touched(folder: Path) -> float:
    return max((folder / name).stat().st_mtime for name in (RECIPE, INDEX, RESULT) if (folder / name).is_file())


def _entry(folder: Path) -> Entry:
    """Of a damaged one at least that it is there."""
    name = name_of_run(folder)
    try:
        if not (folder / RECIPE).is_file():
            subjects = tuple(load_index(folder).subjects)
            when = datetime.datetime.fromtimestamp(_touched(folder), datetime.UTC)
            return Entry(folder, name, subjects[0] if subjects else "", subjects, "evaluation", when, None)
        lock = read_part(Lock, folder / LOCK) if (folder / LOCK).is_file() else None
        model, models = (lock.source.name, tuple(lock.artifacts)) if lock else _asked(folder)
        if lock is None or not (folder / RESULT).is_file():
            return Entry(folder, name, model, models, "not finished", None, None)
        result = read_part(Result, folder / RESULT)
        when = datetime.datetime.fromisoformat(result.finished)
        return Entry(folder, name, model, models, _state(result), when, result.seconds)
    except (QtoolError, ValueError):
        return Entry(folder, name, "", (), "unreadable", None, None)


def _asked(folder: Path) -> tuple[str, tuple[str, ...]]:
    """Model and outputs of a run's recipe: of one that was not finished."""
    asked = parse_yaml(read_text(folder / RECIPE), str(folder / RECIPE))
    model, outputs = asked.get("model"), asked.get("outputs") or []
    name = str(model.get("id", "") if isinstance(model, dict) else model or "")
    made = [one for one in outputs if isinstance(one, dict)] if isinstance(outputs, list) else []
    return Path(name).name, tuple(str(one.get("name") or one.get("method") or "") for one in made)


def _state(result: Result) -> State:
    unsound = any(check.required and check.status == "fail" for checks in result.checks.values() for check in checks)
    if unsound or any(verdict.failed for verdict in result.verdicts):
        return "failed"
    if any(verdict.verdict == "undecided" for verdict in result.verdicts):
        return "undecided"
    return "passed" if result.verdicts else "no gates"


def name_of_run(folder: Path) -> str:
    """The name that it was given; "" where it has none."""
    try:
        found = read_text(folder / NAME).strip() if (folder / NAME).is_file() else ""
    except QtoolError:
        return ""
    return found if _NAME.fullmatch(found) else ""


def check_name(name: str) -> None:
    """Raises QtoolError for what cannot be a run's name."""
    if not _NAME.fullmatch(name) or name == LATEST:
        raise QtoolError(f"--name {name!r:.80}: take letters, digits, dots and dashes, 60 at most, and not {LATEST!r}.")


def give_name(folder: Path, name: str) -> list[str]:
    """Call the run so; ids of those beside it that were called so, and are no longer. Raises QtoolError."""
    check_name(name)
    others = [path.parent for path in folder.resolve().parent.glob(f"*/{NAME}") if name_of_run(path.parent) == name]
    lost = [other for other in others if other.name != folder.resolve().name]
    for other in lost:
        with naming(other / NAME):
            (other / NAME).unlink(missing_ok=True)
    write_whole(folder / NAME, f"{name}\n")
    return [other.name for other in lost]


def find_run(text: str, runs: Path, marker: str = RESULT) -> Path:
    """`latest`, a name, a folder, or the beginning of a run's id in ``runs`` -> its folder.

    ``marker`` is the file that makes a folder eligible. Raises QtoolError when none or several fit.
    """
    if text == LATEST:
        names = [str(entry["run"]) for entry in reversed(ledger.read(runs)) if "run" in entry]
        for name in names:
            if (runs / name / marker).exists():
                return runs / name
        raise QtoolError(f"latest: {runs} has no finished run. Make one with `qtool run RECIPE`.")
    eligible = sorted(path.parent for path in runs.glob(f"*/{marker}"))
    if named := [folder for folder in eligible if name_of_run(folder) == text]:
        return named[0]
    if Path(text).is_dir():
        return Path(text)
    folders = [folder for folder in eligible if folder.name.startswith(text)]
    if len(folders) != 1 or not text:
        there = [name_of_run(folder) or folder.name for folder in eligible]
        what = "several runs begin so" if len(folders) > 1 else "no such run"
        few = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
        raise QtoolError(f"{text}: {what}; {runs} has {few or 'none'} (a beginning is enough), or say latest.")
    return folders[0]


def find_any(text: str, runs: Path) -> Entry:
    """As `find_run`, of all runs and evaluations in ``runs``, finished or not. Raises QtoolError."""
    there = entries(runs)
    found = [entry for entry in there if text and entry.name == text]
    found = found or [entry for entry in there if text and (entry.id.startswith(text) or str(entry.folder) == text)]
    if text == LATEST:
        found = there[-1:]
    if len(found) != 1:
        what = "several runs begin so" if found else "no such run"
        ids = ", ".join(entry.name or entry.id for entry in there[-8:])
        raise QtoolError(f"{text}: {what}; {runs} has {ids or 'none'} (`qtool runs` lists all).")
    return found[0]


def remove(entry: Entry) -> None:
    """Its folder: recipe, scores, report. Artifacts, and scores that other runs hold, stay. Raises QtoolError."""
    if entry.folder.is_symlink():
        raise QtoolError(f"{entry.folder}: is a link; remove it yourself.")
    with alone(entry.folder), naming(entry.folder):
        gone = entry.folder.with_name(f".{entry.id}.removed-{os.getpid()}")
        entry.folder.rename(gone)  # at once: nobody finds half a run
        shutil.rmtree(gone)
