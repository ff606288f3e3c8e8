"""Re-open an artifact and check it: files, tensors, the loading rules of each runtime, and the error against its
source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.folder import PARTIAL, refuse_unfinished
from qtool.convert.files.manifest import MANIFEST, read_manifest
from qtool.convert.files.reading import read_json
from qtool.convert.formats.table import geometry_of, rules_of
from qtool.convert.models.shape import decoder_of
from qtool.convert.runtimes.rule import TENSOR_PARALLEL, Subject
from qtool.convert.verify.config import check_config, check_ledger, check_share
from qtool.convert.verify.files import MISSING, check_files, unfit
from qtool.convert.verify.implied import implied
from qtool.convert.verify.settings import SETTINGS, check_settings, section_faults
from qtool.convert.verify.source import AGAINST_SOURCE, check_against_source, open_source
from qtool.convert.verify.tensors import CPU
from qtool.convert.verify.verification import Check, Verification, over
from qtool.convert.verify.way import way_of

UNSOUND_INPUT = 2  # the exit code of what is wrong with files; others tell of the machine


def verify(
    path: Path, source: Path | None = None, progress: Callable[[str], None] = lambda _: None,
    device: torch.device = CPU,
) -> Verification:  # fmt: skip
    """Run every check that can be made; weights that cannot be opened fail one. ``device``: where tensors are
    dequantized and looked at. Raises QtoolError when ``path`` is no artifact, or ``source`` is no source."""
    if path.is_dir() and not (path / MANIFEST).exists() and not path.name.endswith(PARTIAL):
        raise QtoolError(f"{path}: no {MANIFEST}; only artifacts written by qtool can be verified.")
    refuse_unfinished(path)
    manifest = read_manifest(path)
    original = None if source is None else open_source(path, source)
    result = Verification(path)
    progress("files")
    result.add(*check_files(path, manifest))
    if dangers := [fault for fault in unfit(path, manifest).values() if not fault.endswith(MISSING)]:
        result.checks.append(Check("tensors", "not made", f"{dangers[0]}: nothing is read from this folder"))
        return result
    try:
        artifact = Artifact.open(path)
    except QtoolError as error:
        if error.exit_code != UNSOUND_INPUT:
            raise
        result.add("tensors", [error.message.removeprefix(f"{path}/")], "")
        return result
    check_weights(artifact, original, result, progress, device)
    if original is None:
        result.checks.append(Check(AGAINST_SOURCE, "not made", "no --source given"))
    return result


def check_weights(
    artifact: Artifact, source: Checkpoint | None, result: Verification, progress: Callable[[str], None],
    device: torch.device = CPU,
) -> None:  # fmt: skip
    """Every check that opens the tensors; one that breaks off does not keep the next from being made."""
    way = way_of(artifact)
    progress("tensors")
    with result.guarded("tensors"):
        result.add(*way.check_tensors(artifact, device))
    for name, check in way.FURTHER:
        with result.guarded(name):
            result.add(*check(artifact))
    with result.guarded("config.json"):
        check_model(artifact, result)
    with result.guarded("error ledger"):
        result.add(*check_ledger(artifact))
    with result.guarded("loading rules"):
        check_runtimes(artifact, result)
    if source is not None:
        progress(AGAINST_SOURCE)
        with result.guarded(AGAINST_SOURCE):
            result.add(*check_against_source(artifact, source))
        with result.guarded(SETTINGS):
            result.add(*check_settings(artifact, source))


def check_model(artifact: Artifact, result: Verification) -> None:
    """What config.json implies, and how much of it is quantized."""
    shapes = artifact.weights.shapes()
    model = implied(artifact.path, artifact.config, shapes)
    name, reasons, passed = check_config(artifact, shapes, model)
    result.add(name, [*reasons, *section_faults(artifact)], passed)
    share = check_share(artifact, shapes, model)
    if share is not None:
        result.add(*share)


def subject_of(artifact: Artifact) -> Subject:
    """What the loading rules look at."""
    packed, checkpoint = artifact.packed, artifact.checkpoint
    shapes, zeros, scattered = {}, {}, set()
    for linear in packed.names():
        try:
            shapes[linear] = packed.shape(linear)
            seen = packed.observed(linear)
        except (QtoolError, ValueError):
            continue  # named by the check of the tensors
        if seen.zeros is not None:
            zeros[linear] = seen.zeros
        if seen.scattered:
            scattered.add(linear)
    sides = [artifact.path / name for name in packed.container.COPIES if (artifact.path / name).exists()]
    return Subject(
        artifact.config, shapes, zeros, frozenset(checkpoint.tensors), read_json(sides[0]) if sides else None,
        frozenset(scattered), decoder_of(artifact.config).by_columns(), geometry_of(packed.section),
        {name: own for name in shapes if (own := geometry_of(packed.own(name))) != geometry_of(packed.section)},
    )  # fmt: skip


def check_runtimes(artifact: Artifact, result: Verification) -> None:
    """Static loading rules, one line for each runtime and tensor-parallel size."""
    rules = rules_of(artifact.quantization)
    if not rules:
        return  # the check of the tensors has said so
    subject = subject_of(artifact)
    for rule in rules:
        if not rule.applies(subject):
            continue
        runtime = f"{rule.runtime} {rule.version}"
        for cards in TENSOR_PARALLEL if rule.tensor_parallel else (0,):
            reasons = list(rule.broken(subject, cards or 1))
            label = f"{runtime}: {rule.name}{over(cards)}"
            result.add(label, reasons, rule.passed, rule.required, runtime, cards)
