"""Re-open an artifact and check it: files, tensors, the loading rules of each runtime, and the error against its
source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.folder import PARTIAL, refuse_unfinished
from qtool.convert.files.manifest import MANIFEST, read_manifest
from qtool.convert.files.reading import read_json
from qtool.convert.formats import autogptq
from qtool.convert.formats.containers import geometry_of
from qtool.convert.models.shape import decoder_of
from qtool.convert.runtimes import rules as runtimes
from qtool.convert.verify.config import check_config, check_ledger, check_share, stored_shapes
from qtool.convert.verify.files import MISSING, check_files, unfit
from qtool.convert.verify.implied import implied
from qtool.convert.verify.settings import KEYS, SETTINGS, check_keys, check_settings, section_faults
from qtool.convert.verify.source import AGAINST_SOURCE, check_against_source, open_source
from qtool.convert.verify.tensors import check_gguf, check_tensors
from qtool.convert.verify.verification import Check, Verification, over


def verify(path: Path, source: Path | None = None, progress: Callable[[str], None] = lambda _: None) -> Verification:
    """Run every check that can be made. Raises QtoolError when ``path`` is no artifact or holds no weights that
    can be opened, or ``source`` is no source."""
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
    check_weights(Artifact.open(path), original, result, progress)
    if original is None:
        result.checks.append(Check(AGAINST_SOURCE, "not made", "no --source given"))
    return result


def check_weights(
    artifact: Artifact, source: Checkpoint | None, result: Verification, progress: Callable[[str], None]
) -> None:
    """Every check that opens the tensors; one that breaks off does not keep the next from being made."""
    progress("tensors")
    with result.guarded("tensors"):
        result.add(*(check_tensors(artifact) if artifact.gguf is None else check_gguf(artifact)))
    if artifact.gguf is not None:
        with result.guarded(KEYS):
            result.add(*check_keys(artifact))
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
    shapes = stored_shapes(artifact)
    model = implied(artifact.path, artifact.config, shapes)
    name, reasons, passed = check_config(artifact, shapes, model)
    result.add(name, [*reasons, *section_faults(artifact)], passed)
    share = check_share(artifact, shapes, model)
    if share is not None:
        result.add(*share)


def subject_of(artifact: Artifact) -> runtimes.Subject:
    """What the loading rules look at."""
    packed, checkpoint = artifact.packed, artifact.checkpoint
    shapes, zeros, scattered = {}, {}, set()
    for linear in packed.names():
        try:
            shapes[linear] = packed.shape(linear)
            if packed.section["quant_method"] == "gptq":
                low, high = autogptq.zero_points(checkpoint.tensor(f"{linear}.qzeros"), packed.section).aminmax()
                zeros[linear] = (int(low), int(high))
                g_idx = f"{linear}.g_idx"
                if g_idx in checkpoint.tensors and autogptq.scattered(checkpoint.tensor(g_idx), packed.section):
                    scattered.add(linear)
        except (QtoolError, ValueError):
            continue  # named by the check of the tensors
    side = artifact.path / autogptq.QUANTIZE_CONFIG
    return runtimes.Subject(
        artifact.config, shapes, zeros, frozenset(checkpoint.tensors), read_json(side) if side.exists() else None,
        frozenset(scattered), decoder_of(artifact.config).by_columns(), geometry_of(packed.section),
    )  # fmt: skip


def check_runtimes(artifact: Artifact, result: Verification) -> None:
    """Static loading rules, one line for each runtime and tensor-parallel size."""
    rules = runtimes.RULES.get(str(artifact.quantization.get("quant_method")), ())
    if not rules:
        return  # the check of the tensors has said so
    subject = subject_of(artifact)
    for rule in rules:
        if not rule.applies(subject):
            continue
        runtime = f"{rule.runtime} {rule.version}"
        for cards in runtimes.TENSOR_PARALLEL if rule.tensor_parallel else (0,):
            reasons = list(rule.broken(subject, cards or 1))
            label = f"{runtime}: {rule.name}{over(cards)}"
            result.add(label, reasons, rule.passed, rule.required, runtime, cards)
