"""From a finished run to repositories: what may go out, what each would hold, and its card."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.licence import licence_of
from qtool.convert.files.manifest import MANIFEST, Manifest
from qtool.evaluate.scorecard import Scores
from qtool.recipe.judging import PublishSection
from qtool.recipe.redaction import recipe_without_folders, without_folders
from qtool.report.card import EVIDENCE, PLOT, Card, Published, card_text, eval_files
from qtool.report.figures import size_against
from qtool.report.pictures import kl_points, rate_points
from qtool.runs import ledger
from qtool.runs.baseline import Baseline, measured
from qtool.runs.record import LOCK, RunRecord
from qtool.runs.summary import Size, Summary, summarise
from qtool.share import hub
from qtool.share.admission import Accepted, Offer, licence_keys
from qtool.share.hub import Target, Upload, upload_of


@dataclass(frozen=True)
class PlannedRepository:
    """One repository as it will be: ``uploads`` holds every file, the card among them."""

    target: Target
    names: tuple[str, ...]
    keys: tuple[str, ...]
    source: str
    uploads: tuple[Upload, ...]
    card: str

    @property
    def size(self) -> int:
        return sum(upload.size for upload in self.uploads)


def format_label(manifest: Manifest) -> str:
    """`AWQ-4bit`, `GPTQ-8bit`, `NF4`, `Q4_K_M-GGUF`, `4.50bpw-GGUF`: how people name such repositories."""
    output = manifest.output
    method = str(output["method"]).upper()
    if "type" in output:
        return f"{output['type']}-{method}"
    if "mix" in output:
        return f"{manifest.bits_per_weight:.2f}bpw-{method}"
    return f"{method}-{output['bits']}bit" if "bits" in output else method


def repository(section: PublishSection, name: str, manifest: Manifest) -> str:
    """`org/name` after the template. Raises QtoolError for a template with unknown keys or a name the Hub forbids."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    default = "{model}-quantized" if section.layout == "folders" else "{model}-{format}"
    template = section.to if "/" in section.to else f"{section.to}/{default}"
    words = {"model": manifest.source["name"], "output": name, "format": format_label(manifest)}
    try:
        repo = template.format_map(words)
        validate_repo_id(repo)
    except (KeyError, IndexError, ValueError, AttributeError, HFValidationError) as error:
        reason = str(error) if isinstance(error, HFValidationError) else "it may hold {model}, {output} and {format}"
        raise QtoolError(f"publish: to: {template!r} names no repository: {reason}.") from error
    return repo


def plan(accepted: Sequence[Accepted], section: PublishSection) -> list[PlannedRepository]:
    """The repositories; ``accepted`` with what --allow-failed forgave. Raises QtoolError when two would be one."""
    named = [(repository(section, c.name, c.manifest), c, v, forgiven) for c, v, forgiven in accepted]
    groups: dict[str, list[Accepted]] = {}
    for repo, offer, checked, forgiven in named:
        groups.setdefault(repo, []).append((offer, checked, forgiven))
    for repo, members in groups.items():
        if len(members) > 1 and section.layout == "repository":
            names = ", ".join(offer.name for offer, _, _ in members)
            raise QtoolError(f"{names} would all go to {repo}. Put {{output}} into `to:`, or use `layout: folders`.")
    return [_plan(repo, members, section) for repo, members in groups.items()]


def _plan(repo: str, members: Sequence[Accepted], section: PublishSection) -> PlannedRepository:
    run = members[0][0].run
    folders = section.layout == "folders"
    items, uploads = [], []
    for offer, checked, forgiven in members:
        prefix = offer.name if folders else ""
        gates = [v for v in offer.run.verdicts if v.output == offer.name] if offer.run else []
        items.append(
            Published(
                offer.name,
                format_label(offer.manifest),
                prefix,
                offer.manifest,
                checked.checks,
                gates,
                forgiven,
            )
        )
        uploads += _files(offer, prefix)
    names = [item.name for item in items]
    summary = run.summary.only(names) if run else summarise(Scores(), {item.name: _size(item) for item in items})
    source = items[0].manifest.source
    base = section.base_model or (str(source["model"]) if not str(source["commit"]).startswith("sha256:") else None)
    picture = plot(summary)
    licence = licence_of(licence_keys(items[0].manifest, section))
    card = Card(
        repo,
        base,
        licence,
        items,
        summary,
        recipe_without_folders(run.recipe_text) if run else "",
        picture is not None,
    )
    made = {"README.md": card_text(card)}
    made |= eval_files(card, {task: (b.dataset, b.task) for task, b in section.benchmarks.items()})
    made |= {PLOT: picture} if picture else {}
    made |= {EVIDENCE: _evidence(run, names)} if run and (run.folder / LOCK).exists() else {}
    uploads += [upload_of(name, text.encode()) for name, text in made.items()]
    target = Target(repo, section.revision or "main", section.pr, section.private)
    keys = tuple(item.manifest.key for item in items)
    return PlannedRepository(target, tuple(names), keys, str(source["model"]), tuple(uploads), made["README.md"])


def _files(offer: Offer, prefix: str) -> list[Upload]:
    """The files of the manifest and the manifest: nothing else that lies in the folder."""
    at = f"{prefix}/" if prefix else ""
    entries = offer.manifest.files.items()
    files = [Upload(at + name, offer.path / name, entry.bytes, entry.sha256) for name, entry in entries]
    manifest = without_folders(offer.manifest.model_dump(mode="json"))
    return [*files, upload_of(at + MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())]


def _size(item: Published) -> Size:
    made = item.manifest
    return Size(made.tensor_bytes, made.bits_per_weight, made.file_bytes)


def _evidence(run: RunRecord, names: Sequence[str]) -> str:
    """Which problems each model solved and its KL window by window: enough to compute the table again."""
    whole: Baseline = measured(run.folder)
    kept = {name: found for name, found in whole.subjects.items() if name in ("source", *names)}
    chosen = whole.model_copy(update={"subjects": kept}).model_dump(mode="json")
    for subject in chosen["subjects"].values():
        subject["tasks"] = {without_folders(label): found for label, found in subject["tasks"].items()}
    return json.dumps(without_folders(chosen), indent=1) + "\n"


def plot(summary: Summary) -> str | None:
    """Size against pass rate of the first task, or against KL where no task was run; None where nothing was."""
    tasks = list(summary.models["source"].tasks) if "source" in summary.models else []
    if tasks:
        points, axis = rate_points(summary, tasks[0]), f"pass@1 on {Path(tasks[0]).name}"
    else:
        points = [point for point in kl_points(summary) if point.name != "source"]
        axis = "mean KL to the source, nats a token"
    return size_against(points, axis, higher_is_better=bool(tasks)) if points else None


def stale_files(planned: PlannedRepository, remote: hub.Remote | None) -> list[str]:
    """Files of an earlier publication to remove. Raises QtoolError when the repository holds something else."""
    if remote is None:
        return []
    mine = {upload.path for upload in planned.uploads}
    others = [name for name in remote.files if name != hub.SIGNATURE]
    if not others:
        return []
    same = {u.path: u.blob_id() for u in planned.uploads if u.path.rsplit("/", 1)[-1] == MANIFEST}
    manifests = {name: blob for name, (_, _, blob) in remote.files.items() if name.rsplit("/", 1)[-1] == MANIFEST}
    target = planned.target
    if manifests == same:  # the very artifacts: at most their card is new
        return [name for name in others if name not in mine and _of_qtool(name)]
    if not manifests:
        raise QtoolError(
            f"{target.repo}: already holds something else ({len(others)} files, {others[0]} first), nothing that qtool "
            "published. Choose another name with --to."
        )
    if not target.pr and target.revision == "main":
        raise QtoolError(
            f"{target.repo}: already holds another artifact. Choose another name with --to, propose to replace it with "
            "--pr, or put this one on a branch with --revision."
        )
    return [name for name in others if name not in mine]


def _of_qtool(name: str) -> bool:
    return name in (EVIDENCE, PLOT) or name.startswith(".eval_results/")


def send(planned: PlannedRepository) -> hub.Publication:
    """Check the repository, upload, read back. Raises QtoolError as `hub.publish` and `stale_files` do."""
    texts = {u.path: u.source if isinstance(u.source, bytes) else u.source.read_bytes() for u in planned.uploads
             if u.size < 1 << 22}  # fmt: skip
    hub.quiet_secret(texts)
    remote = hub.look(planned.target.repo, planned.target.revision) or hub.look(planned.target.repo)
    stale = stale_files(planned, remote)
    message = f"{', '.join(planned.names)} of {planned.source} by qtool ({planned.keys[0][:12]})"
    return hub.publish(planned.target, planned.uploads, stale, message, remote.head if remote else None)


def with_options(section: PublishSection | None, to: str | None, **changes: Any) -> PublishSection:
    """The recipe's section with what the command line says. Raises QtoolError where neither says where to."""
    if section is None and to is None:
        raise QtoolError("where to? Say --to org, --to org/name, or `publish: {to: …}` in the recipe.")
    given = {key: value for key, value in changes.items() if value not in (None, False)}
    base = section or PublishSection(to=str(to))
    return base.model_copy(update=given | ({"to": to} if to else {}))


def note(runs: Path, planned: PlannedRepository, sent: hub.Publication) -> None:
    """A line in the ledger: what went where, as which commit."""
    entry = {"repo": sent.repo, "revision": planned.target.revision, "commit": sent.commit, "url": sent.url}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    ledger.append(
        runs, {"time": now, "publish": entry | {"artifacts": dict(zip(planned.names, planned.keys, strict=True))}}
    )
