"""Re-open an artifact and check it: files, tensors, the loading rules of each runtime, and the error against its
source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from qtool import QtoolError
from qtool.convert import autogptq, runtimes
from qtool.convert.artifact import EXTRAS, MANIFEST, QUANTIZE_CONFIG, Artifact, Manifest
from qtool.convert.checkpoint import Checkpoint, TensorInfo
from qtool.convert.gguf_file import GgufFile
from qtool.convert.gguf_metadata import required_keys
from qtool.convert.gguf_names import ROPE_FREQS
from qtool.convert.gguf_types import is_70b, tensor_types
from qtool.convert.reading import read_json
from qtool.convert.source import sha256_file
from qtool.convert.writer import Spec

Status = Literal["pass", "fail", "not made"]
AGAINST_SOURCE = "error against the source"
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

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """What breaks a check off has failed it: the files may be anybody's."""
        try:
            yield
        except QtoolError as error:
            self.add(name, [error.message], "")
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            self.add(name, [f"cannot be checked ({type(error).__name__}: {error})"], "")

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
    with result.guarded("tensors"):
        result.add(*(check_tensors(artifact) if artifact.gguf is None else check_gguf(artifact)))
    with result.guarded("loading rules"):
        check_runtimes(artifact, result)
    if source is None:
        result.checks.append(Check(AGAINST_SOURCE, "not made", "no --source given"))
    else:
        progress(AGAINST_SOURCE)
        original = Checkpoint.open(source)
        with result.guarded(AGAINST_SOURCE):
            result.add(*check_against_source(artifact, original))
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
    weights = {file.name for pattern in ("*.safetensors", "*.gguf") for file in path.glob(pattern)}
    strangers = weights - set(manifest.files)
    reasons += [f"{name} is not in the manifest" for name in sorted(strangers)]
    return "files and sha256", reasons, f"{len(manifest.files)} files as written"


def check_tensors(artifact: Artifact) -> tuple[str, list[str], str]:
    """Every linear of the manifest unpacks to its shape with finite, positive scales; every other tensor is finite."""
    assert artifact.manifest is not None
    packed, tensors = artifact.packed, artifact.checkpoint.tensors
    try:
        linears = packed.names()
    except QtoolError as error:
        return "tensors", [f"config.json: {error.message}"], ""
    reasons = [f"{name} is missing" for name in sorted(set(artifact.manifest.ledger) - set(linears))]
    made = artifact.manifest.output
    for key, said in packed.container.geometry(packed.section).items():
        if key == "desc_act" and said is False:
            continue  # what the recipe calls desc_act is an order of rounding; the groups are of neighbouring columns
        if key in made and said != made[key]:
            reasons.append(f"config.json says {key} {said}, the artifact was made with {made[key]}")
    for name, info in tensors.items():
        if info.dtype.is_floating_point and not bool(artifact.checkpoint.tensor(name).isfinite().all()):
            reasons.append(f"{name} holds NaN or Inf")
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(str(made.get("dtype")), torch.float32)
    for linear in linears:
        try:
            expected = packed.container.specs(*packed.shape(linear), packed.section, dtype)
        except (KeyError, ValueError, TypeError, QtoolError) as error:
            reasons.append(f"{linear} cannot be read: {error}")
            continue
        reasons += _misfits(linear, expected, tensors)
        for suffix in packed.container.POSITIVE:
            name = f"{linear}.{suffix}"
            if name in tensors and not bool((artifact.checkpoint.tensor(name) > 0).all()):
                reasons.append(f"{name} holds zeros or negative numbers")
    count = len(tensors)
    return "tensors", reasons, f"{count} tensors present and finite, {len(linears)} linears packed"


def check_gguf(artifact: Artifact) -> tuple[str, list[str], str]:
    """Every tensor that the linears of the manifest imply, with the type of llama.cpp's rule and finite; the keys that
    llama.cpp cannot do without."""
    assert artifact.manifest is not None
    assert isinstance(artifact.weights, GgufFile)
    file, config = artifact.weights, artifact.config
    wanted = {f"{linear}.weight" for linear in artifact.manifest.ledger} | {"model.embed_tokens.weight"}
    reasons = [f"{name} is missing" for name in sorted(wanted - set(file.hf_names()))]
    shapes = {name: shape for name, (_, shape) in file.layout.items()}
    made = artifact.manifest.output["type"]
    for name, typed in tensor_types(shapes, made, config["num_hidden_layers"], is_70b(config)).items():
        found = file.layout[name][0]
        if name != ROPE_FREQS and found != typed.type:
            reasons.append(f"{name} is {found}, llama.cpp's rule for {made} says {typed.type}")
        elif not bool(file.blocks(name).dequantize().isfinite().all()):
            reasons.append(f"{name} holds NaN or Inf")
    architecture = file.metadata("general.architecture")
    reasons += [f"the key {key} is missing" for key in required_keys(str(architecture)) if file.metadata(key) is None]
    tokens = file.metadata("tokenizer.ggml.tokens") or []
    rows = shapes.get("token_embd.weight", (len(tokens),))[0]
    if len(tokens) != rows:
        reasons.append(f"{len(tokens)} tokens in the vocabulary, {rows} rows in token_embd.weight")
    return "tensors", reasons, f"{len(shapes)} tensors as llama.cpp's rules type them, finite; {len(tokens)} tokens"


def _misfits(linear: str, expected: Mapping[str, Spec], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    for suffix, (dtype, shape) in expected.items():
        found = tensors.get(f"{linear}.{suffix}")
        if found is None:
            yield f"{linear}.{suffix} is missing"
        elif found.shape != shape:
            yield f"{linear}.{suffix} has shape {list(found.shape)}, expected {list(shape)}"
        elif found.dtype != dtype:
            yield f"{linear}.{suffix} is {found.dtype}, expected {dtype}"


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
    side = artifact.path / QUANTIZE_CONFIG
    return runtimes.Subject(
        artifact.config, shapes, zeros, frozenset(checkpoint.tensors), read_json(side) if side.exists() else None,
        frozenset(scattered),
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
        for tp in runtimes.TENSOR_PARALLEL if rule.tensor_parallel else (1,):
            label = f"{rule.runtime} {rule.version}: {rule.name}" + (f", TP {tp}" if rule.tensor_parallel else "")
            result.add(label, list(rule.broken(subject, tp)), rule.passed, required=rule.required)


def check_against_source(artifact: Artifact, source: Checkpoint) -> tuple[str, list[str], str]:
    """Each linear's |W - Ŵ| / |W| with fold scales undone, against the figure the manifest recorded when it was
    made."""
    assert artifact.manifest is not None
    folder = artifact.path / EXTRAS
    scales = Checkpoint.open(folder) if folder.exists() else None  # nothing was folded where there is none
    reasons = []
    for linear, record in artifact.manifest.ledger.items():
        info, quantized = source.tensors.get(f"{linear}.weight"), artifact.codes(linear).dequantize()
        if info is None or info.shape != quantized.shape:
            found = "no such tensor" if info is None else f"{list(info.shape)}"
            reasons.append(f"{linear} is {list(quantized.shape)} here and {found} there: not its source")
            continue
        weight = source.tensor(f"{linear}.weight").float()
        error = relative_frobenius(weight, quantized, _scales_of(scales, linear))
        if not abs(error - record["frobenius"]) <= FROBENIUS_TOLERANCE * max(record["frobenius"], 1e-6):
            reasons.append(f"{linear}: |W - Ŵ|/|W| is {error:.4g}, the manifest says {record['frobenius']:.4g}")
    return AGAINST_SOURCE, reasons, f"{len(artifact.manifest.ledger)} linears as recorded"


def relative_frobenius(
    weight: torch.Tensor, quantized: torch.Tensor, scales: tuple[torch.Tensor, torch.Tensor] | None
) -> float:
    """``|W - Ŵ| / |W|`` in the source's own scaling: Ŵ's columns divided by, its rows multiplied by the fold scales."""
    if scales is not None:
        columns, rows = scales
        quantized = quantized / columns * rows.unsqueeze(1)
    return float((quantized - weight).norm() / weight.norm().clamp_min(1e-30))


def _scales_of(scales: Checkpoint | None, linear: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    if scales is None or f"{linear}.columns" not in scales.tensors:
        return None
    return scales.tensor(f"{linear}.columns"), scales.tensor(f"{linear}.rows")
