"""An artifact from the Hub: fetched, verified against its manifest, its numbers held against those known here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qtool import QtoolError, hub
from qtool.baseline import load_baseline, resolve_side
from qtool.card import EVIDENCE
from qtool.compare import Change, compare, pair_up
from qtool.convert.artifact import MANIFEST, Manifest, read_manifest
from qtool.convert.verify import Verification, verify


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


def pull(repo: str, revision: str | None, folder: Path, runs: Path) -> tuple[str, list[Pulled]]:
    """The commit, and each artifact in it. Raises QtoolError for a repository that qtool did not publish, and for a
    folder that holds something else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / ".cache/huggingface").is_dir():
        raise QtoolError(f"{folder}: exists and was not pulled from the Hub. Choose another folder with --into.")
    remote = hub.look(repo, revision or "main")
    if remote is None:
        raise QtoolError(f"{repo}: no such repository or revision on the Hub, or hidden from this token.")
    places = [PurePosixPath(name).parent for name in remote.files if PurePosixPath(name).name == MANIFEST]
    if not places:
        raise QtoolError(f"{repo}: holds no {MANIFEST}; only what qtool published can be verified. Use `hf download`.")
    commit = hub.fetch(repo, remote.head, folder)
    return commit, [_examine(folder / place, folder / EVIDENCE, runs) for place in sorted(places)]


def _examine(path: Path, evidence: Path, runs: Path) -> Pulled:
    manifest = read_manifest(path)
    outside = [n for n in manifest.files if PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts]
    if outside:
        raise QtoolError(f"{path / MANIFEST}: names a file outside its folder ({outside[0]}). Do not trust it.")
    checked, unchecked, faults, changes = _published_numbers(path, manifest, evidence, runs)
    return Pulled(path, verify(path), checked, unchecked, faults, changes)


def _published_numbers(
    path: Path, manifest: Manifest, evidence: Path, runs: Path
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
    try:
        here = resolve_side(str(path), runs)
        pairs, _ = pair_up((published, name), here)
        changes = compare(pairs, published.source == here[0].source)
    except QtoolError as error:
        return checked, [f"scores: {error.message}"], [], []
    return checked, [], [], changes
