"""Re-open an artifact and check it: files, tensors, the loading rules of each runtime, and the error against its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from qtool import QtoolError
from qtool.convert import runtimes
from qtool.convert.artifact import EXTRAS, MANIFEST, Artifact, Manifest
from qtool.convert.checkpoint import Checkpoint
from qtool.convert.source import sha256_file

Status = Literal["pass", "fail", "not made"]
FROBENIUS_TOLERANCE = 1e-3  # relative; float32 sums in another order move the sixth digit


@dataclass(frozen=True)
class Check:
    """One line of the report. ``required`` checks decide whether the artifact is sound; loading rules only inform."""

    name: str
    status: Status
    detail: str
    required: bool = True


@dataclass
class Verification:
    """All checks of one artifact, those not made included."""

    path: Path
    checks: list[Check] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not any(check.required and check.status == "fail" for check in self.checks)

    def add(self, name: str, reasons: list[str], passed: str, required: bool = True) -> None:
        """A check fails with its first reasons or passes with ``passed``."""
        more = f" (+{len(reasons) - 3} more)" if len(reasons) > 3 else ""
        detail = "; ".join(reasons[:3]) + more if reasons else passed
        self.checks.append(Check(name, "fail" if reasons else "pass", detail, required))


def verify(path: Path, source: Path | None = None, progress: Callable[[str], None] = lambda _: None) -> Verification:
    """Run every check that can be made. Raises QtoolError when the folder cannot be opened at all."""
    artifact = Artifact.open(path)
    if artifact.manifest is None:
        raise QtoolError(f"{path}: no {MANIFEST}; only artifacts written by qtool can be verified.")
    result = Verification(path)
    progress("files")
    result.add(*check_files(path, artifact.manifest))
    progress("tensors")
    result.add(*check_tensors(artifact))
    check_runtimes(artifact, result)
    if source is None:
        result.checks.append(Check("error against the source", "not made", "no --source given"))
    else:
        progress("error against the source")
        result.add(*check_against_source(artifact, Checkpoint.open(source)))
    return result


def check_files(path: Path, manifest: Manifest) -> tuple[str, list[str], str]:
    """Every file of the manifest is there with its sha256, and no weight file besides."""
    reasons = []
    for name, entry in manifest.files.items():
        file = path / name
        if not file.exists():
            reasons.append(f"{name} is missing")
        elif file.stat().st_size != entry.bytes:
            reasons.append(f"{name} has {file.stat().st_size} bytes, the manifest says {entry.bytes}")
        elif sha256_file(file) != entry.sha256:
            reasons.append(f"{name} has changed (sha256)")
    strangers = {file.name for file in path.glob("*.safetensors")} - set(manifest.files)
    reasons += [f"{name} is not in the manifest" for name in sorted(strangers)]
    return "files and sha256", reasons, f"{len(manifest.files)} files as written"


def check_tensors(artifact: Artifact) -> tuple[str, list[str], str]:
    """Every linear of the manifest unpacks to its shape with finite, positive scales; every other tensor is finite."""
    assert artifact.manifest is not None
    reasons = []
    linears = artifact.linears()
    missing = sorted(set(artifact.manifest.ledger) - set(linears))
    reasons += [f"{name} is missing" for name in missing]
    group_size = int(artifact.manifest.output["group_size"])
    if artifact.quantization.get("group_size") != group_size:
        said = artifact.quantization.get("group_size")
        reasons.append(f"config.json says group_size {said}, the artifact was made with {group_size}")
    tensors = artifact.checkpoint.tensors
    for name, info in tensors.items():
        if info.dtype.is_floating_point and not bool(artifact.checkpoint.tensor(name).isfinite().all()):
            reasons.append(f"{name} holds NaN or Inf")
    for linear in linears:
        columns, words = tensors[f"{linear}.qweight"].shape
        for suffix, shape in (("qzeros", (columns // group_size, words)), ("scales", (columns // group_size, words * 8))):
            found = tensors.get(f"{linear}.{suffix}")
            if found is None or found.shape != shape:
                what = "is missing" if found is None else f"has shape {list(found.shape)}, expected {list(shape)}"
                reasons.append(f"{linear}.{suffix} {what}")
            elif suffix == "scales" and not bool((artifact.checkpoint.tensor(f"{linear}.scales") > 0).all()):
                reasons.append(f"{linear}.scales holds zeros or negative numbers")
    count = len(artifact.checkpoint.tensors)
    return "tensors", reasons, f"{count} tensors present and finite, {len(linears)} linears packed"


def subject_of(artifact: Artifact) -> runtimes.Subject:
    """Config and linear shapes, for the loading rules."""
    shapes = {}
    for linear in artifact.linears():
        columns, words = artifact.checkpoint.tensors[f"{linear}.qweight"].shape
        shapes[linear] = (words * 8, columns)
    return runtimes.Subject(artifact.config, shapes)


def check_runtimes(artifact: Artifact, result: Verification) -> None:
    """Static loading rules, one line for each runtime and tensor-parallel size."""
    subject = subject_of(artifact)
    for rule in runtimes.RULES.get(str(artifact.quantization.get("quant_method")), ()):
        for tp in runtimes.TENSOR_PARALLEL if rule.tensor_parallel else (1,):
            label = f"{rule.runtime} {rule.version}: {rule.name}" + (f", TP {tp}" if rule.tensor_parallel else "")
            # keys are a fault of the artifact; a kernel that does not take these shapes is a fact about the model
            result.add(label, list(rule.broken(subject, tp)), "loads by the rules", required=rule.name == "keys")


def check_against_source(artifact: Artifact, source: Checkpoint) -> tuple[str, list[str], str]:
    """Each linear's |W - Ŵ| / |W| with fold scales undone, against the figure the manifest recorded when it was made."""
    assert artifact.manifest is not None
    scales = Checkpoint.open(artifact.path / EXTRAS)
    reasons = []
    for linear, record in artifact.manifest.ledger.items():
        weight = source.tensor(f"{linear}.weight").float()
        error = relative_frobenius(weight, artifact.codes(linear).dequantize(), _scales_of(scales, linear))
        if not abs(error - record["frobenius"]) <= FROBENIUS_TOLERANCE * max(record["frobenius"], 1e-6):
            reasons.append(f"{linear}: |W - Ŵ|/|W| is {error:.4g}, the manifest says {record['frobenius']:.4g}")
    return "error against the source", reasons, f"{len(artifact.manifest.ledger)} linears as recorded"


def relative_frobenius(weight: torch.Tensor, quantized: torch.Tensor, scales: tuple[torch.Tensor, torch.Tensor]) -> float:
    """``|W - Ŵ| / |W|`` in the source's own scaling: Ŵ's columns divided by, its rows multiplied by the fold scales."""
    columns, rows = scales
    restored = quantized / columns * rows.unsqueeze(1)
    return float((restored - weight).norm() / weight.norm().clamp_min(1e-30))


def _scales_of(scales: Checkpoint, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
    return scales.tensor(f"{linear}.columns"), scales.tensor(f"{linear}.rows")
