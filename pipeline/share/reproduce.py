"""An artifact built again from what its manifest says, and compared with itself tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.manifest import Manifest
from qtool.convert.files.reading import named, shown
from qtool.convert.files.source import resolve
from qtool.convert.text.source import TextSource
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.text.windows import token_windows
from qtool.make.device import choose_device
from qtool.make.job import THREADS, device_kind, open_job
from qtool.make.outputs import MOST_THREADS, make_artifacts
from qtool.quantize.calibration import CalibrationSet
from qtool.recipe.sections import Recipe


@dataclass(frozen=True)
class Reproduction:
    """``differing``: tensors that are not the same bit for bit, and how; ``reasons``: why that may be."""

    tensors: int
    differing: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Given:
    """What a person says instead of the manifest: where source and calibration text lie here."""

    source: str | None = None
    text: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False


def reproduce(folder: Path, given: Given, work: Path) -> Reproduction:
    """Build in ``work`` and compare. Raises QtoolError where source or calibration are not those of the manifest."""
    original = Artifact.open(folder)
    manifest = original.manifest
    if manifest is None:
        raise QtoolError(f"{folder}: no qtool.json; only artifacts written by qtool say how they were made.")
    recipe = _recipe(folder, manifest, given, work)
    source = resolve(recipe.model.id, recipe.model.revision)
    if source.commit != manifest.source["commit"]:
        raise QtoolError(
            f"{recipe.model.id} is at {source.commit}, the artifact was made from {manifest.source['commit']}: not the "
            "same source. Name the right one with --source."
        )
    job = open_job(recipe, source, choose_device(given.device), recipe.outputs)
    tokenizer = load_tokenizer(source.path, given.trust_remote_code)
    rows = getattr(job.config, "vocab_size", None)
    calibration = CalibrationSet(token_windows(recipe.calibration, tokenizer, rows), recipe.calibration.text)
    if manifest.calibration and calibration.digest != manifest.calibration["digest"]:
        raise QtoolError(f"{recipe.calibration.text}: not the calibration text that was used. Name it with --text.")
    (made,) = make_artifacts(job, calibration, _threads(manifest)).values()
    before, after = original.weights.stored(), made.weights.stored()
    names = list(dict.fromkeys([*before, *after]))
    differing = []
    for name in names:  # one tensor of each at a time: a model may be larger than the memory
        how = _difference(*(side[name]() if name in side else None for side in (before, after)))
        differing += [f"{name}: {how}"] if how else []
    assert made.manifest is not None
    reasons = list(_reasons(manifest, device_kind(job.device), made.manifest.versions))
    return Reproduction(len(names), tuple(differing), tuple(reasons))


def published(name: str) -> bool:
    """Whether ``name`` is a repository of the Hub, and no folder. Raises QtoolError (exit 2) for a folder that is not
    there: what lies in a folder that is here, or is written as a path, is never looked for on the network."""
    folder = named(name)
    if folder.exists():
        return False
    first = Path(name).parts[0] if Path(name).parts else ""
    is_path = name.startswith(".") or first in ("artifacts", "runs") or Path(first).exists()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not is_path:
        return True
    there = folder.parent
    others = sorted(path.name for path in there.iterdir() if path.is_dir())[:8] if there.is_dir() else []
    raise QtoolError(
        f"{shown(name)}: no such folder." + (f" {there} has {', '.join(others)}." if others else "")
        + " Name an artifact's folder, or ORG/NAME of a repository on the Hub."
    )  # fmt: skip


def _threads(manifest: Manifest) -> int | None:
    """As many as it was made with: with another number a processor's sums end in other bits."""
    said = manifest.versions.get(THREADS, "")
    return int(said) if said.isdecimal() and 0 < int(said) <= MOST_THREADS else None


def _recipe(folder: Path, manifest: Manifest, given: Given, work: Path) -> Recipe:
    commit = str(manifest.source["commit"])
    local = commit.startswith("sha256:") or (given.source is not None and Path(given.source).is_dir())
    calibration = {k: v for k, v in manifest.calibration.items() if k in TextSource.model_fields}
    if given.text is not None:
        calibration["text"] = given.text
    model = {"id": given.source or manifest.source["model"], "trust_remote_code": given.trust_remote_code}
    data = {
        "model": model if local else model | {"revision": commit},
        "outputs": [manifest.output],
        "experts": manifest.calibration.get("experts", {}),
        "output_dir": str(work),
    }
    try:
        return Recipe.model_validate(data | ({"calibration": calibration} if calibration else {}))
    except ValidationError as error:
        raise QtoolError(
            f"{folder}/qtool.json: says no recipe this qtool understands ({error.errors()[0]['msg']})."
        ) from error


def _difference(before: torch.Tensor | None, after: torch.Tensor | None) -> str:
    if before is None or after is None:
        return "only in the new one" if before is None else "missing in the new one"
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return f"{before.dtype} {tuple(before.shape)}, built again {after.dtype} {tuple(after.shape)}"
    unequal = before.contiguous().view(torch.uint8) != after.contiguous().view(torch.uint8)
    if not bool(unequal.any()):
        return ""
    return f"{int((before != after).sum()):,} of {before.numel():,} numbers differ"


def _reasons(manifest: Manifest, device: str, here: dict[str, str]) -> Iterator[str]:
    if manifest.device != device:
        yield f"made on {manifest.device}, built again on {device}"
    for name in sorted(manifest.versions.keys() | here.keys()):
        if name == THREADS and name not in manifest.versions:
            yield f"built again with {here[name]} threads; how many it was made with is not recorded"
        elif manifest.versions.get(name) != here.get(name):
            yield f"{name} {manifest.versions.get(name)} then, {here.get(name)} now"
