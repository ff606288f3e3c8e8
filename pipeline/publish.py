"""From a finished run to repositories: what may go out, what each would hold, and its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool import QtoolError, hub
from qtool.baseline import Baseline, measured
from qtool.card import EVIDENCE, PLOT, Card, Published, card_text, eval_files
from qtool.convert.artifact import MANIFEST, PARTIAL, Manifest, read_manifest
from qtool.convert.licence import licence_fault, licence_of
from qtool.convert.verify import Verification, verify
from qtool.evaluate.rates import mean_rate
from qtool.evaluate.regression import bootstrap_mean
from qtool.figures import Point, size_against
from qtool.hub import Target, Upload, upload_of
from qtool.recipe import PublishSection
from qtool.record import LOCK, RESULT, RunRecord, find_run, load_run
from qtool.scores import Scores


@dataclass(frozen=True)
class Candidate:
    """An artifact that someone wants to publish, with the run that judged it, if any did."""

    name: str
    path: Path
    manifest: Manifest
    run: RunRecord | None


@dataclass(frozen=True)
class Plan:
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


def candidates(text: str, runs: Path, only: Sequence[str] = ()) -> list[Candidate]:
    """What ``text`` names: the outputs of a run, or one artifact's folder. Raises QtoolError for an unfinished one."""
    path = Path(text)
    if path.name.endswith(PARTIAL) or (not path.exists() and path.with_name(path.name + PARTIAL).exists()):
        raise QtoolError(f"{text}: an unfinished artifact. Run its recipe again; it continues where it stopped.")
    if (path / MANIFEST).exists():
        manifest = read_manifest(path)
        run, name = _judged_by(manifest.key, runs)
        return [Candidate(name or manifest.output["name"], path, manifest, run)]
    run = load_run(find_run(text, runs))
    unknown = [name for name in only if name not in run.manifests]
    if unknown:
        raise QtoolError(f"--only {unknown[0]}: the run made {', '.join(run.manifests)}.")
    places = {name: run.folder / entry.path for name, entry in run.lock.artifacts.items()}
    return [Candidate(n, places[n], m, run) for n, m in run.manifests.items() if not only or n in only]


def _judged_by(key: str, runs: Path) -> tuple[RunRecord | None, str | None]:
    """The newest finished run that made this very artifact, and its name there."""
    for result in sorted(runs.glob(f"*/{RESULT}"), key=lambda file: file.stat().st_mtime, reverse=True):
        run = load_run(result.parent)
        for name, entry in run.lock.artifacts.items():
            if entry.key == key:
                return run, name
    return None, None


def refusals(candidate: Candidate, section: PublishSection) -> tuple[list[str], list[str], Verification | None]:
    """Reasons that nothing overrides, reasons that --allow-failed overrides, and the fresh checks."""
    folder = candidate.path
    if not (folder / MANIFEST).exists():
        unfinished = folder.with_name(folder.name + PARTIAL).exists()
        return [f"{folder} is {'unfinished' if unfinished else 'gone'}; run the recipe again"], [], None
    if read_manifest(folder).key != candidate.manifest.key:
        return [f"{folder} holds another artifact than the run made"], [], None
    try:
        checked = verify(folder)
    except QtoolError as error:
        return [error.message], [], None
    hard = [f"{c.name}: {c.detail}" for c in checked.checks if c.required and c.status == "fail"]
    carried = any(name.upper().startswith("LICENSE") for name in candidate.manifest.files)
    fault = licence_fault(_licence_keys(candidate.manifest, section), carried)
    if fault:
        hard.append(f"{fault}. If you know better, say `publish: {{license: …}}` in the recipe, or --license")
    return hard, _gate_faults(candidate), checked


def _gate_faults(candidate: Candidate) -> list[str]:
    if candidate.run is None:
        return ["no run judged it"]
    verdicts = [v for v in candidate.run.verdicts if v.output == candidate.name]
    if not verdicts:
        return ["no gate judged it"]
    return [f"gate {v.verdict}: {v.gate}: {v.reason}" for v in verdicts if v.verdict != "pass"]


def _licence_keys(manifest: Manifest, section: PublishSection) -> dict[str, Any]:
    """What the recipe says, else what the source said. Naming a licence replaces all that the source said of it."""
    said = {"license": section.license, "license_name": section.license_name, "license_link": section.license_link}
    if section.license is None:
        said = {key: value or manifest.source.get(key) for key, value in said.items()}
    return said | {"base_model": manifest.source.get("base_model")}


def format_label(manifest: Manifest) -> str:
    """`AWQ-4bit`, `GPTQ-8bit`, `NF4`, `Q4_K_M-GGUF`: how people name such repositories."""
    output = manifest.output
    if output["method"] == "gguf":
        return f"{output['type']}-GGUF"
    bits = f"-{output['bits']}bit" if "bits" in output else ""
    return f"{output['method'].upper()}{bits}"


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


def plan(
    accepted: Sequence[tuple[Candidate, Verification, Sequence[str]]], section: PublishSection
) -> list[Plan]:
    """The repositories; ``accepted`` with what --allow-failed forgave. Raises QtoolError when two would be one."""
    named = [(repository(section, c.name, c.manifest), c, v, forgiven) for c, v, forgiven in accepted]
    groups: dict[str, list[tuple[Candidate, Verification, Sequence[str]]]] = {}
    for repo, candidate, checked, forgiven in named:
        groups.setdefault(repo, []).append((candidate, checked, forgiven))
    for repo, members in groups.items():
        if len(members) > 1 and section.layout == "repository":
            names = ", ".join(candidate.name for candidate, _, _ in members)
            raise QtoolError(f"{names} would all go to {repo}. Put {{output}} into `to:`, or use `layout: folders`.")
    return [_plan(repo, members, section) for repo, members in groups.items()]


def _plan(
    repo: str, members: Sequence[tuple[Candidate, Verification, Sequence[str]]], section: PublishSection
) -> Plan:
    run = members[0][0].run
    folders = section.layout == "folders"
    items, uploads = [], []
    for candidate, checked, forgiven in members:
        prefix = candidate.name if folders else ""
        gates = [v for v in candidate.run.verdicts if v.output == candidate.name] if candidate.run else []
        items.append(
            Published(
                candidate.name, format_label(candidate.manifest), prefix, candidate.manifest, checked.checks, gates,
                forgiven,
            )
        )
        uploads += _files(candidate, prefix)
    names = [item.name for item in items]
    scores = _only(run.scores, names) if run else Scores()
    sizes = {n: s for n, s in run.sizes.items() if n in ("source", *names)} if run else {
        item.name: (item.manifest.tensor_bytes, item.manifest.bits_per_weight) for item in items
    }  # fmt: skip
    source = items[0].manifest.source
    base = section.base_model or (str(source["model"]) if not str(source["commit"]).startswith("sha256:") else None)
    picture = plot(scores, sizes)
    licence = licence_of(_licence_keys(items[0].manifest, section))
    card = Card(repo, base, licence, items, scores, sizes, run.recipe_text if run else "", picture is not None)
    made = {"README.md": card_text(card)}
    made |= eval_files(card, {task: (b.dataset, b.task) for task, b in section.benchmarks.items()})
    made |= {PLOT: picture} if picture else {}
    made |= {EVIDENCE: _evidence(run, names)} if run and (run.folder / LOCK).exists() else {}
    uploads += [upload_of(name, text.encode()) for name, text in made.items()]
    target = Target(repo, section.revision or "main", section.pr, section.private)
    keys = tuple(item.manifest.key for item in items)
    return Plan(target, tuple(names), keys, str(source["model"]), tuple(uploads), made["README.md"])


def _files(candidate: Candidate, prefix: str) -> list[Upload]:
    """The files of the manifest and the manifest: nothing else that lies in the folder."""
    at = f"{prefix}/" if prefix else ""
    entries = candidate.manifest.files.items()
    files = [Upload(at + name, candidate.path / name, entry.bytes, entry.sha256) for name, entry in entries]
    return [*files, upload_of(at + MANIFEST, (candidate.path / MANIFEST).read_bytes())]


def _only(scores: Scores, names: Sequence[str]) -> Scores:
    kept = ("source", *names)
    return Scores(
        {name: found for name, found in scores.tasks.items() if name in kept},
        {name: found for name, found in scores.fidelity.items() if name in kept},
    )


def _evidence(run: RunRecord, names: Sequence[str]) -> str:
    """Which problems each model solved and its KL window by window: enough to compute the table again."""
    whole: Baseline = measured(run.folder)
    kept = {name: found for name, found in whole.subjects.items() if name in ("source", *names)}
    return whole.model_copy(update={"subjects": kept}).model_dump_json(indent=1) + "\n"


def plot(scores: Scores, sizes: Mapping[str, tuple[int, float]]) -> str | None:
    """Size against pass rate of the first task, or against KL where no task was run; None where nothing was."""
    points, axis, higher = [], "", True
    tasks = list(scores.tasks.get("source", {}))
    for name, (nbytes, _) in sizes.items():
        score = scores.tasks.get(name, {}).get(tasks[0]) if tasks else None
        fidelity = scores.fidelity.get(name)
        if score is not None:
            interval = mean_rate(score.solved, score.samples)
            axis = f"pass@1 on {Path(tasks[0]).name}"
        elif not tasks and fidelity is not None and name != "source":
            interval, axis, higher = bootstrap_mean(fidelity.kl), "mean KL to the source, nats a token", False
        else:
            continue
        points.append(Point(name, nbytes, interval.estimate, interval.low, interval.high))
    return size_against(points, axis, higher_is_better=higher) if points else None


def stale_files(planned: Plan, remote: hub.Remote | None) -> list[str]:
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


def send(planned: Plan) -> hub.Publication:
    """Check the repository, upload, read back. Raises QtoolError as `hub.publish` and `stale_files` do."""
    texts = {u.path: u.source if isinstance(u.source, bytes) else u.source.read_bytes() for u in planned.uploads
             if u.size < 1 << 22}  # fmt: skip
    hub.quiet_secret(texts)
    remote = hub.look(planned.target.repo, planned.target.revision) or hub.look(planned.target.repo)
    stale = stale_files(planned, remote)
    message = f"{', '.join(planned.names)} of {planned.source} by qtool ({planned.keys[0][:12]})"
    return hub.publish(planned.target, planned.uploads, stale, message)


def with_options(section: PublishSection | None, to: str | None, **changes: Any) -> PublishSection:
    """The recipe's section with what the command line says. Raises QtoolError where neither says where to."""
    if section is None and to is None:
        raise QtoolError("where to? Say --to org, --to org/name, or `publish: {to: …}` in the recipe.")
    given = {key: value for key, value in changes.items() if value not in (None, False)}
    base = section or PublishSection(to=str(to))
    return base.model_copy(update=given | ({"to": to} if to else {}))


