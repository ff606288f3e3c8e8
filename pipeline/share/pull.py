"""An artifact from the Hub: fetched, verified against its manifest, its numbers held against those known here, or
measured here on the spot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qtool import QtoolError
from qtool.convert.files.manifest import MANIFEST, Manifest, read_manifest
from qtool.convert.files.reading import named, shown
from qtool.convert.verify.verification import Verification
from qtool.evaluate.engines.table import ENGINES
from qtool.recipe.judging import EvaluateSection
from qtool.report.card import EVIDENCE
from qtool.runs.baseline import Baseline, load_baseline
from qtool.runs.compare import Change, compare, pair_up
from qtool.runs.sides import resolve_side
from qtool.share import hub


@dataclass(frozen=True)
class Again:
    """Score the artifact here too. ``source``: the source model (folder or Hub id), without which there is no KL."""

    source: str | None
    device: str


@dataclass(frozen=True)
class Pulled:
    """One artifact as it arrived. ``checked`` and ``unchecked``: of the published numbers, one sentence each;
    ``changes``: the published scores (A) against the scores that this machine has of the same artifact (B)."""

    path: Path
    verification: Verification
    checked: Sequence[str]
    unchecked: Sequence[str]
    faults: Sequence[str]
    changes: Sequence[Change]

    @property
    def sound(self) -> bool:
        return self.verification.sound and not self.faults and not any(c.shown == "worse" for c in self.changes)


def pull(
    repo: str, revision: str | None, folder: Path, runs: Path, again: Again | None = None
) -> tuple[str, list[Pulled]]:
    """The commit, and each artifact in it, scored anew where ``again`` says so. Raises QtoolError for a repository that
    qtool did not publish, and for a folder that holds something else."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise QtoolError(f"{shown(repo)}: is no name of a repository on the Hub, which is ORG/NAME.{_is_here(repo)}")
    if folder.exists() and any(folder.iterdir()) and not (folder / ".cache/huggingface").is_dir():
        raise QtoolError(f"{folder}: exists and was not pulled from the Hub. Choose another folder with --into.")
    remote = hub.look(repo, revision or "main")
    if remote is None:
        raise QtoolError(f"{repo}: no such repository or revision on the Hub, or hidden from this token.")
    places = [PurePosixPath(name).parent for name in remote.files if PurePosixPath(name).name == MANIFEST]
    if not places:
        raise QtoolError(f"{repo}: holds no {MANIFEST}; only what qtool published can be verified. Use `hf download`.")
    commit = hub.fetch(repo, remote.head, folder)
    return commit, [_examine(folder / place, folder / EVIDENCE, runs, again) for place in sorted(places)]


def _is_here(name: str) -> str:
    return f" It is a folder here: `qtool verify {name}` checks it." if named(name).is_dir() else ""


def _examine(path: Path, evidence: Path, runs: Path, again: Again | None) -> Pulled:
    from qtool.convert.verify.checks import verify  # with torch: only where something arrived

    manifest = read_manifest(path)
    verification = verify(path)
    checked, unchecked, faults, changes = _published_numbers(
        path, manifest, evidence, runs, again if verification.sound else None
    )
    return Pulled(path, verification, checked, unchecked, faults, changes)


def _published_numbers(
    path: Path, manifest: Manifest, evidence: Path, runs: Path, again: Again | None
) -> tuple[list[str], list[str], list[str], list[Change]]:
    if not evidence.exists():
        return [], [f"no {EVIDENCE} was published: its card's scores cannot be held against anything"], [], []
    published = load_baseline(evidence)
    name = next((n for n, subject in published.subjects.items() if subject.key == manifest.key), None)
    if name is None:
        return [], [], [f"{EVIDENCE} has no scores of this artifact"], []
    said = published.subjects[name]
    if (said.nbytes, said.bits_per_weight) != (manifest.tensor_bytes, manifest.bits_per_weight):
        return [], [], [f"{EVIDENCE} gives another size than the manifest"], []
    checked = ["size and bits a weight: as published"]
    left_out = _score(path, published, again, runs) if again else []
    try:
        here = resolve_side(str(path), runs)
        pairs, _ = pair_up((published, name), here)
        changes = compare(pairs, published.source == here[0].source)
    except QtoolError as error:
        return checked, [*left_out, f"scores: {error.message}"], [], []
    return checked, left_out, [], changes


def _score(path: Path, published: Baseline, again: Again, runs: Path) -> list[str]:
    """Ask the artifact here what it was asked before it was published; what cannot be asked, one sentence each."""
    from qtool.measure.scoring import evaluate_folders

    section, left_out = asked_again(published.asked, with_text=again.source is not None)
    if section is not None:
        source = Path(again.source) if again.source else None
        evaluate_folders(path, source, section, runs, again.device, trust_remote_code=False)
    return left_out


def asked_again(asked: EvaluateSection | None, with_text: bool) -> tuple[EvaluateSection | None, list[str]]:
    """A stranger's questions, made safe: tasks and texts by name alone, no file of this machine, no server, always in a
    sandbox. None where nothing is left; what was left out, one sentence each."""
    if asked is None:
        return None, ["scores: the card does not say what was asked"]
    if ENGINES[asked.engine].facts.served:
        return None, ["scores: were made through a server, which is not asked again"]
    left_out = [f"{task.task}: problems from a file, which the card does not bring" for task in asked.tasks
                if task.file or not _is_name(task.task)]  # fmt: skip
    tasks = tuple(task for task in asked.tasks if task.file is None and _is_name(task.task))
    text = asked.text
    if text is not None and not (_is_name(text.text) and with_text):
        why = "its text is a file, which the card does not bring" if with_text else "needs --source"
        left_out.append(f"KL: {why}")
        text = None
    if asked.long is not None:
        left_out.append("the long text: is not asked again")
    if not tasks and text is None:
        return None, left_out
    safe = {"tasks": tasks, "text": text, "long": None, "sandbox": "auto"}
    return asked.model_copy(update=safe), left_out


def _is_name(text: str) -> bool:
    """Of something shipped or on the Hub; no path."""
    return re.fullmatch(r"[\w+-]+(/[\w.-]+)?", text) is not None and not Path(text).exists()
