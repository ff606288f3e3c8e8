"""Scores without a recipe: of folders, of what a server has, and of the harness itself."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from qtool.convert.artifact import Artifact
from qtool.convert.files.durable import require_writable
from qtool.convert.files.manifest import MANIFEST, read_manifest
from qtool.convert.files.sidecars import check_sidecars
from qtool.convert.files.source import name_of, resolve
from qtool.convert.models.fused import open_model
from qtool.convert.models.refusals import check_sizes
from qtool.convert.models.tied import check_folder
from qtool.convert.skeleton import load_config
from qtool.evaluate.engines.openai import connect
from qtool.evaluate.scorecard import Scores
from qtool.evaluate.selfcheck import SelfCheck
from qtool.make.device import choose_device
from qtool.make.progress import progress_bar
from qtool.measure.scores import Evaluation
from qtool.measure.subjects import Subject, artifact_subject, source_subject
from qtool.recipe.checking import digest_of
from qtool.recipe.judging import EvaluateSection
from qtool.runs import record
from qtool.runs.summary import Size, Summary, save_summary, summarise


def evaluate_folders(
    model: Path, source: Path | None, section: EvaluateSection, runs: Path, device: str, trust_remote_code: bool
) -> Scores:
    """Score a model (a folder, a shipped name, a Hub id), and its source beside it where given. Raises QtoolError."""
    if os.path.isdir(model):
        name = name_of(model)
    else:
        found = resolve(str(model))
        name, model = found.name, found.path
    require_writable(runs, "--runs")
    check_sidecars(model)
    artifact = Artifact.open(model)
    if artifact.gguf is None and not artifact.quantization:
        artifact.checkpoint.check_dtypes()
        check_sizes(artifact.checkpoint, artifact.config)
    config = load_config(model, trust_remote_code)
    check_folder(model)
    subjects = [artifact_subject(name, artifact)]
    if source is not None and any(source.glob("*.gguf")):  # llama.cpp compares two of its own files
        subjects.insert(0, artifact_subject("source", Artifact.open(source)))
    elif source is not None:
        resolved = resolve(str(source))
        check_folder(resolved.path)
        subjects.insert(0, source_subject(open_model(resolved.path), resolved.commit))
    elif section.text is not None or section.long is not None:
        subjects[0] = replace(subjects[0], name="source")
    folder = runs / digest_of([subject.key for subject in subjects])[:16]
    return _scored(Evaluation(section, model, config, choose_device(device), runs, folder, trust_remote_code), subjects)


def score_folders(
    model: Path, source: Path | None, section: EvaluateSection, runs: Path, device: str, trust_remote_code: bool
) -> Summary:
    """As `evaluate_folders`, summarised, with the sizes that an artifact's manifest knows. Raises QtoolError."""
    scores = evaluate_folders(model, source, section, runs, device, trust_remote_code)
    manifest = read_manifest(model) if (model / MANIFEST).exists() else None
    sizes = {}
    if manifest is not None:
        if source is not None and not any(source.glob("*.gguf")):
            nbytes = sum(info.nbytes for info in open_model(resolve(str(source)).path).tensors.values())
            sizes["source"] = Size(nbytes, nbytes * manifest.bits_per_weight / manifest.tensor_bytes)
        sizes[name_of(model)] = Size(manifest.tensor_bytes, manifest.bits_per_weight, manifest.file_bytes)
    return summarise(scores, sizes)


def evaluate_served(section: EvaluateSection, runs: Path) -> Scores:
    """Score what a server has (``section.models``: one name -> the model there; empty: its only one). Raises
    QtoolError."""
    assert section.base_url is not None
    require_writable(runs, "--runs")
    model = connect(section.base_url, next(iter(section.models.values()), None)).model
    section = section.model_copy(update={"models": {model: model}})
    subject = Subject(model, digest_of([section.base_url, model]))
    folder = runs / subject.key[:16]
    return _scored(Evaluation(section, None, None, torch.device("cpu"), runs, folder), [subject])


def check_harness(section: EvaluateSection, model: Path | None, runs: Path, trusted: bool) -> dict[str, SelfCheck]:
    """Known answers to the section's tasks, put with ``model``'s tokenizer where one is named. Raises QtoolError."""
    evaluation = Evaluation(section, model, None, torch.device("cpu"), runs, runs, trusted)
    with progress_bar() as bar:
        return evaluation.self_check(bar)


def _scored(evaluation: Evaluation, subjects: list[Subject]) -> Scores:
    with record.alone(evaluation.run), progress_bar() as bar:
        scores = evaluation.score(subjects, bar)
        record.write_scores(evaluation.run, {subject.name: subject.key for subject in subjects}, scores)
        save_summary(evaluation.run, summarise(scores))
    return scores
