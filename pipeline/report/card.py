"""The model card: a pure function of what a run knows. Everything that others wrote is escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from qtool.convert.files.licence import Licence
from qtool.convert.files.manifest import Manifest
from qtool.convert.verify.verification import Check
from qtool.evaluate.engines.facts import Download
from qtool.evaluate.engines.table import ON_CARDS
from qtool.report.along import TITLE, along_note, along_rows
from qtool.report.measured import measured_rows, measured_ways
from qtool.report.served import PROVED, proof_rows, proof_ways
from qtool.report.tables import Row, columns, count_of, footnote, score_rows
from qtool.runs.coverage import coverage, place_of
from qtool.runs.gates import GateResult
from qtool.runs.summary import ModelSummary, Summary

PLOT, EVIDENCE = "size-against-score.svg", "qtool-scores.json"
LIBRARY = "transformers"  # as the Hub calls what loads most models
WORST = 10
READ = "These follow from each runtime's own loading rules, checked on these files; {}."
UNSTARTED = "nobody started them here"


@dataclass(frozen=True)
class Published:
    """One artifact on the card. ``folder`` within the repository ("" = its root); ``verdicts`` its gates;
    ``refused``: why it would not have been published without --allow-failed."""

    name: str
    label: str
    folder: str
    manifest: Manifest
    checks: Sequence[Check]
    verdicts: Sequence[GateResult]
    refused: Sequence[str] = ()


@dataclass(frozen=True)
class Card:
    """All that the card is made of."""

    repo: str
    base_model: str | None
    licence: Licence
    artifacts: Sequence[Published]
    summary: Summary
    recipe_text: str
    plot: bool


def card_text(card: Card) -> str:
    """README.md."""
    source = card.artifacts[0].manifest.source
    labels = ", ".join(item.label for item in card.artifacts)
    base = f"[{escape(card.base_model)}](https://huggingface.co/{card.base_model})" if card.base_model else None
    parts = [
        f"---\n{metadata(card)}\n---",
        f"# {escape(card.repo.split('/')[-1])}",
        f"{base or escape(str(source['name']))} quantized to {escape(labels)} with qtool. Source commit "
        f"`{code(str(source['commit']))}`. The licence is the source's: {_licence(card.licence)}.",
        *_warnings(card),
        "## What it cost",
        _table(score_rows(card.summary)),
        _plain(footnote(card.summary)) + f" The figures behind the table: `{EVIDENCE}`.",
    ]
    if card.plot:
        parts.append(f"![Size against score]({PLOT})")
    if rows := along_rows(card.summary):
        parts += [f"## {TITLE}", _table(rows), escape(along_note(card.summary))]
    if rows := measured_rows(card.summary.measured):
        parts += ["## Memory and speed", _table(rows), escape(" ".join(measured_ways(card.summary.measured)))]
    if rows := proof_rows(card.summary.proofs):
        parts += ["## In real servers", PROVED, _table(rows), escape(" ".join(proof_ways(card.summary.proofs)))]
    for item in card.artifacts:
        parts += _section(item, card.repo, len(card.artifacts) > 1)
    parts += _making(card)
    return "\n\n".join(part for part in parts if part) + "\n"


def metadata(card: Card) -> str:
    """The YAML that the Hub reads. Source: https://huggingface.co/docs/hub/model-cards"""
    from huggingface_hub import ModelCardData

    formats = [item.manifest.output["method"] for item in card.artifacts]
    licence = card.licence
    calibration = [str(item.manifest.calibration.get("text", "")) for item in card.artifacts]
    datasets = list(dict.fromkeys(text for text in calibration if re.fullmatch(r"[\w.-]+/[\w.-]+", text)))
    data = ModelCardData(
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        base_model=card.base_model,
        base_model_relation="quantized" if card.base_model else None,
        library_name=_library(card.artifacts[0].manifest),
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["code", "quantized", *formats, *(item.label for item in card.artifacts), "qtool"])),
        datasets=[text for text in datasets if not text.endswith((".txt", ".jsonl", ".parquet"))] or None,
        model_name=card.repo.split("/")[-1],
        eval_results=_results(card) or None,
    )
    if not data.eval_results:
        data.pop("model_name")
    text: str = data.to_yaml()
    return text


def _library(manifest: Manifest) -> str:
    """What the Hub calls the library that loads it."""
    from qtool.convert.formats.table import format_of  # it brings torch

    stored = format_of(manifest.output)
    if stored is None or LIBRARY in {runtime.engine for runtime in stored.RUNS_IN}:
        return LIBRARY
    return str(manifest.output["method"])


def _results(card: Card) -> list[Any]:
    """`model-index`: pass rates and KL of each artifact, as the Hub still shows them for data sets of any kind."""
    from huggingface_hub import EvalResult

    task: dict[str, Any] = {"task_type": "text-generation", "task_name": "Code generation"}
    found = []
    for item in card.artifacts:
        suffix = f" ({item.name})" if len(card.artifacts) > 1 else ""
        model = card.summary.models.get(item.name, ModelSummary())
        for name, score in model.tasks.items():
            label = name.replace("\\", "/").rsplit("/", 1)[-1]
            value = round(score.rate.estimate, 4)
            found.append(
                EvalResult(
                    **task,
                    dataset_type=label,
                    dataset_name=label,
                    metric_type="pass@1",
                    metric_value=value,
                    metric_name=f"pass@1 on {count_of(len(score.solved), 'problem')}{suffix}",
                )
            )
        if model.text is not None and math.isfinite(model.text.kl.estimate):
            value = round(model.text.kl.estimate, 6)
            found.append(
                EvalResult(
                    **task,
                    dataset_type="held-out-text",
                    dataset_name="held-out text",
                    metric_type="kl-divergence",
                    metric_name=f"mean KL to the source, nats a token{suffix}",
                    metric_value=value,
                )
            )
    return found


def eval_files(card: Card, benchmarks: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """`.eval_results/*.yaml` for tasks that are registered benchmarks: task -> (data set, its task id). One artifact
    alone: a repository has one result for a benchmark. Source: https://huggingface.co/docs/hub/eval-results"""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files = {}
    alone = card.artifacts[0].name if len(card.artifacts) == 1 else ""
    tasks = card.summary.models.get(alone, ModelSummary()).tasks
    for task, (dataset, task_id) in benchmarks.items():
        if task in tasks:
            value = round(tasks[task].rate.estimate, 4)
            entry = EvalResultEntry(dataset_id=dataset, task_id=task_id, value=value, notes="pass@1, measured by qtool")
            name = re.sub(r"[^A-Za-z0-9.-]+", "_", task)
            files[f".eval_results/{name}.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def escape(text: str) -> str:
    """Text that is neither HTML nor Markdown, nor ends its line or its table cell."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", text)


def code(text: str) -> str:
    """Text between single backticks."""
    return " ".join(text.split()).replace("`", "'").replace("|", "/")


def fenced(text: str, language: str) -> str:
    """A code block that its own text cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _licence(licence: Licence) -> str:
    name = escape(licence.name or licence.id)
    link = licence.link or ""
    return f"[{name}](<{link}>)" if re.fullmatch(r"(https://|LICENSE)[^\s<>()]*", link) else name


def _warnings(card: Card) -> list[str]:
    return [
        f"> **Published although it did not pass** ({escape(item.name)}): {escape('; '.join(item.refused))}."
        for item in card.artifacts
        if item.refused
    ]


def _table(rows: list[Row]) -> str:
    """The score table; brackets of intervals stay as they are, everything named is escaped."""
    heads = columns(rows)
    lines = ["| " + " | ".join(map(escape, heads)) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [escape(row["model"]), *(_plain(row.get(head, "")) for head in heads if head != "model")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text of our own, whose brackets stay, around names of others: no HTML, no end of a table's cell."""
    return text.replace("|", "/").replace("<", "&lt;")


def _section(item: Published, repo: str, named: bool) -> list[str]:
    manifest = item.manifest
    title = f" ({escape(item.name)})" if named else ""
    gates = [f"- **{v.verdict}** {escape(v.gate)}: {escape(v.reason)}" for v in item.verdicts]
    ways = loading(item, repo)
    started = ", ".join(dict.fromkeys(proof.engine for proof in manifest.proofs if proof.passed))
    read = READ.format(f"{started} was started with them" if started else UNSTARTED)
    parts = [f"## How to load it{title}", *ways, read] if ways else []
    parts += [f"## Gates{title}", "\n".join(gates)] if gates else []
    rules = [check for check in item.checks if not check.required]
    broken = [f"- {escape(check.name)}: {escape(check.detail)}" for check in rules if check.status == "fail"]
    if broken:
        parts += [f"## Runtimes whose kernels do not take it{title}", "\n".join(broken)]
    measured = [(linear, r) for linear, r in manifest.ledger.items() if "error" in r]
    if measured:
        worst = sorted(measured, key=lambda pair: -pair[1]["error"])[:WORST]
        lines = ["| linear | relative output error, round to nearest | as published |", "|---|---|---|"]
        lines += [f"| `{code(name)}` | {r['rtn_error']:.4f} | {r['error']:.4f} |" for name, r in worst]
        parts += [f"## What was lost where{title}", "\n".join(lines)]
    if reached := coverage(manifest.ledger):
        parts += [f"## What the experts saw{title}", reached.sentence]
    parts += ["\n".join(f"- {escape(note)}" for note in manifest.notes)]
    return parts


def loading(item: Published, repo: str) -> list[str]:
    """Commands for the runtimes whose static rules hold in these checks; each says that they were read, not run."""
    from qtool.convert.formats.table import format_of  # it brings torch

    stored = format_of(item.manifest.output)
    if stored is None:
        return []
    mixed = any(map(place_of, item.manifest.ledger))
    name = repo.split("/")[-1]
    folder = f"./{name}/{item.folder}/" if item.folder else f"./{name}/"
    place, fetch = folder.removesuffix("/") if item.folder else repo, f"hf download {repo} --local-dir ./{name}"
    blocks = [fenced(fetch, "bash")] if item.folder and stored.SAFETENSORS else []
    for facts in ON_CARDS:
        runtime = next((runtime for runtime in stored.RUNS_IN if runtime.engine == facts.name), None)
        if runtime is None or (stored.RULES and not _holds(item.checks, runtime.title)):
            continue
        if mixed and any(runtime.refuses_experts(stored.section_of(item.manifest.output))):
            continue
        packages = (runtime.package,) if runtime.package else ()
        download = Download(repo, place, fetch, folder, tuple(item.manifest.files), packages)
        blocks += [fenced(text, language) for text, language in facts.load(download)]
    return blocks


def _holds(checks: Sequence[Check], runtime: str) -> bool:
    """Whether some loading rule of a runtime passed on one card, and none failed that is required or that no number of
    cards changes."""
    rules = [check for check in checks if runtime in check.name.split(":")[0]]
    single = [c for c in rules if "TP " not in c.name or c.name.endswith("TP 1")]
    return any(c.status == "pass" for c in single) and not any(
        c.status == "fail" and (c.required or not c.cards) for c in single
    )


def _making(card: Card) -> list[str]:
    manifest = card.artifacts[0].manifest
    versions = ", ".join(f"{code(name)} {code(value)}" for name, value in manifest.versions.items())
    name = card.repo.split("/")[-1]
    again = "\n".join(f"qtool reproduce {name}" + (f"/{i.folder}" if i.folder else "") for i in card.artifacts)
    recipe = [fenced(card.recipe_text, "yaml")] if card.recipe_text else []
    return [
        "## How it was made",
        *recipe,
        f"On {escape(manifest.device)}, with {versions}. `qtool.json` has each file's sha256, each linear's error.",
        "To fetch it, verify it, build it again and compare every tensor (where source or calibration text are local "
        "files, name them with `--source` and `--text`):",
        fenced(f"qtool pull {card.repo}\n{again}", "bash"),
    ]
