"""What may be published: an artifact that is finished, unchanged, judged and passed, under a licence that allows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.folder import PARTIAL
from qtool.convert.files.licence import licence_fault
from qtool.convert.files.manifest import MANIFEST, Manifest, read_manifest
from qtool.convert.verify.checks import verify
from qtool.convert.verify.verification import Verification
from qtool.recipe.judging import PublishSection
from qtool.runs.record import RESULT, RunRecord, load_run
from qtool.runs.shelf import find_run


@dataclass(frozen=True)
class Offer:
    """An artifact that someone wants to publish, with the run that judged it, if any did."""

    name: str
    path: Path
    manifest: Manifest
    run: RunRecord | None


Accepted = tuple[Offer, Verification, Sequence[str]]  # the last: what --allow-failed forgave


def offers(text: str, runs: Path, only: Sequence[str] = ()) -> list[Offer]:
    """What ``text`` names: the outputs of a run, or one artifact's folder. Raises QtoolError for an unfinished one."""
    path = Path(text)
    if path.name.endswith(PARTIAL) or (not path.exists() and path.with_name(path.name + PARTIAL).exists()):
        raise QtoolError(f"{text}: an unfinished artifact. Run its recipe again; it continues where it stopped.")
    if (path / MANIFEST).exists():
        manifest = read_manifest(path)
        run, name = _judged_by(manifest.key, runs)
        return [Offer(name or manifest.output["name"], path, manifest, run)]
    run = load_run(find_run(text, runs))
    unknown = [name for name in only if name not in run.manifests]
    if unknown:
        raise QtoolError(f"--only {unknown[0]}: the run made {', '.join(run.manifests)}.")
    places = {name: run.folder / entry.path for name, entry in run.lock.artifacts.items()}
    return [Offer(n, places[n], m, run) for n, m in run.manifests.items() if not only or n in only]


def _judged_by(key: str, runs: Path) -> tuple[RunRecord | None, str | None]:
    """The newest finished run that made this very artifact, and its name there."""
    for result in sorted(runs.glob(f"*/{RESULT}"), key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            run = load_run(result.parent)
        except QtoolError:  # of another version, or incomplete: it judges nothing
            continue
        for name, entry in run.lock.artifacts.items():
            if entry.key == key:
                return run, name
    return None, None


def refusals(offer: Offer, section: PublishSection) -> tuple[list[str], list[str], Verification | None]:
    """Reasons that nothing overrides, reasons that --allow-failed overrides, and the fresh checks."""
    folder = offer.path
    if not (folder / MANIFEST).exists():
        unfinished = folder.with_name(folder.name + PARTIAL).exists()
        return [f"{folder} is {'unfinished' if unfinished else 'gone'}; run the recipe again"], [], None
    if read_manifest(folder).key != offer.manifest.key:
        return [f"{folder} holds another artifact than the run made"], [], None
    try:
        checked = verify(folder)
    except QtoolError as error:
        return [error.message], [], None
    hard = [f"{c.name}: {c.detail}" for c in checked.checks if c.required and c.status == "fail"]
    carried = any(name.upper().startswith("LICENSE") for name in offer.manifest.files)
    fault = licence_fault(licence_keys(offer.manifest, section), carried)
    if fault:
        hard.append(f"{fault}. If you know better, say --license, or `publish: {{license: …}}` in the recipe")
    return hard, _gate_faults(offer), checked


def accept(offers: Sequence[Offer], section: PublishSection, allow_failed: bool) -> list[Accepted]:
    """Those that may go out, with what --allow-failed forgave. Raises QtoolError (exit 1) naming every reason when one
    of them may not: then none goes."""
    accepted: list[Accepted] = []
    refused: list[str] = []
    for offer in offers:
        hard, soft, checked = refusals(offer, section)
        reasons = hard if allow_failed else [*hard, *soft]
        refused += [f"  {offer.name}: {reason}" for reason in reasons]
        if checked is not None and not reasons:
            accepted.append((offer, checked, soft))
    if refused:
        ways = ["`--only NAME` publishes one output"] if len(offers) > 1 else []
        ways.append("`gates:` in the recipe judge an output (run it again: nothing is made twice)")
        if not allow_failed:
            ways.append("`--allow-failed` publishes what gates failed or none judged, and the card says so")
        said = "\n".join([*refused, f"Ways on: {'; '.join(ways)}."])
        raise QtoolError(f"nothing was published:\n{said}", exit_code=1)
    return accepted


def _gate_faults(offer: Offer) -> list[str]:
    if offer.run is None:
        return ["no run judged it"]
    verdicts = [v for v in offer.run.verdicts if v.output == offer.name]
    if not verdicts:
        return ["no gate judged it"]
    return [f"gate {v.verdict}: {v.gate}: {v.reason}" for v in verdicts if v.verdict != "pass"]


def licence_keys(manifest: Manifest, section: PublishSection) -> dict[str, Any]:
    """What the recipe says, else what the source said. Naming a licence replaces all that the source said of it."""
    said = {"license": section.license, "license_name": section.license_name, "license_link": section.license_link}
    if section.license is None:
        said = {key: value or manifest.source.get(key) for key, value in said.items()}
    return said | {"base_model": manifest.source.get("base_model")}
