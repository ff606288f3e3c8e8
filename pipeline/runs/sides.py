"""One side of a comparison, however it is named."""

from __future__ import annotations

from pathlib import Path

from qtool import QtoolError
from qtool.runs.baseline import Baseline, load_baseline, measured
from qtool.runs.foreign import is_log, load_log
from qtool.runs.record import load_index
from qtool.runs.shelf import find_run


def resolve_side(text: str, runs: Path) -> tuple[Baseline, str | None]:
    """One side of a comparison: RUN, RUN:NAME, a baseline FILE.json, FILE.json:NAME, an artifact's folder, or a log of
    lm-eval or inspect_ai.

    The name is None where all models of the run are meant. Raises QtoolError saying what there is instead.
    """
    if (Path(text) / "config.json").exists():
        return _of_artifact(Path(text), runs)
    if is_log(Path(text)):
        return load_log(Path(text)), None
    place, colon, name = text.rpartition(":")
    if not colon or not place:
        place, name = text, ""
    elif not name:
        raise QtoolError(f"{text}: no model is named behind the colon.")
    found = load_baseline(Path(place)) if place.endswith(".json") else measured(find_run(place, runs, "scores.json"))
    if name and name not in found.subjects:
        raise QtoolError(f"{text}: no model {name!r} there; it has {', '.join(found.subjects)}.")
    return found, name or None


def _of_artifact(path: Path, runs: Path) -> tuple[Baseline, str]:
    """The newest scores of that very artifact, or of another tool's folder with those very files."""
    from qtool.convert.files.folder import key_of  # with all that reads a model's files

    key = key_of(path)
    indices = sorted(runs.glob("*/scores.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for index in indices:
        for name, found in load_index(index.parent).subjects.items():
            if found == key:
                return measured(index.parent), name
    raise QtoolError(f"{path}: {runs} has no scores of this artifact. Run `qtool run` or `qtool evaluate` on it first.")
