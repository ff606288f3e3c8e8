"""The check of an artifact against its source: every tensor, quantized or not, is what the manifest says it became."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.folder import EXTRAS, FOLD_SCALES
from qtool.convert.files.reading import read_json, shown
from qtool.convert.formats.gguf.file import GgufFile
from qtool.convert.verify.tensors import Result, adds_one

AGAINST_SOURCE = "error against the source"
FROBENIUS_TOLERANCE = 1e-3  # relative; float32 sums in another order move the sixth digit
PLAIN_TOLERANCE = 0.02  # of what is not quantized, rounded to 16 bits once or twice
BLOCKS_TOLERANCE = 0.15  # of an embedding in a GGUF type; Q4_K's error is below 0.1
# A norm -> the linear whose columns it is divided by, where a scale was folded.
NORMS = {
    "input_layernorm": "self_attn.q_proj",
    "post_attention_layernorm": "mlp.gate_proj",
    "pre_feedforward_layernorm": "mlp.gate_proj",
}
SAME_INPUT = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))

Scales = tuple[torch.Tensor, torch.Tensor]


def open_source(artifact: Path, source: Path) -> Checkpoint:
    """Raises QtoolError for the artifact itself and for a model that is quantized already."""
    if source.is_dir() and source.resolve() == artifact.resolve():
        raise QtoolError(f"{source}: is the artifact itself. --source wants the model that it was made from.")
    opened = Checkpoint.open(source)
    if read_json(source / "config.json").get("quantization_config"):
        raise QtoolError(f"{source}: is quantized itself. --source wants the model that the artifact was made from.")
    return opened


def check_against_source(artifact: Artifact, source: Checkpoint) -> Result:
    """Each linear's |W - Ŵ| / |W| with fold scales undone, against the figure the manifest recorded when it was made;
    and every other tensor against its own."""
    assert artifact.manifest is not None
    ledger, there = artifact.manifest.ledger, artifact.linears()
    linears = [*(name for name in ledger if name in set(there)), *(name for name in there if name not in ledger)]
    folder = artifact.path / EXTRAS
    folded = any(folder.glob(f"{FOLD_SCALES}*.safetensors"))
    scales = Checkpoint.open(folder) if folded else None
    reasons = [] if linears else ["no linear to compare"]
    for linear in linears:
        info, quantized = source.tensors.get(f"{linear}.weight"), artifact.codes(linear).dequantize()
        if info is None or info.shape != quantized.shape:
            found = "no such tensor" if info is None else f"{list(info.shape)}"
            reasons.append(f"{linear} is {list(quantized.shape)} here and {found} there: not its source")
            continue
        weight = source.tensor(f"{linear}.weight").float()
        error = relative_frobenius(weight, quantized, _scales_of(scales, linear))
        said = ledger.get(linear, {}).get("frobenius")
        if said is None:
            reasons.append(f"{linear}: |W - Ŵ|/|W| is {error:.4g}, the manifest says nothing")
        elif not math.isfinite(error) or not abs(error - said) <= FROBENIUS_TOLERANCE * max(said, 1e-6):
            reasons.append(f"{linear}: |W - Ŵ|/|W| is {error:.4g}, the manifest says {said:.4g}")
    if not reasons:  # else it is another model's source
        reasons = [*_fold_faults(scales, linears), *_plain_faults(artifact, source, scales)]
    return AGAINST_SOURCE, reasons, f"{len(linears)} linears as recorded"


def relative_frobenius(weight: torch.Tensor, quantized: torch.Tensor, scales: Scales | None) -> float:
    """``|W - Ŵ| / |W|`` in the source's own scaling: Ŵ's columns divided by, its rows multiplied by the fold scales."""
    if scales is not None:
        columns, rows = scales
        quantized = quantized / columns * rows.unsqueeze(1)
    return float((quantized - weight).norm() / weight.norm().clamp_min(1e-30))


def _scales_of(scales: Checkpoint | None, linear: str) -> Scales | None:
    if scales is None or f"{linear}.columns" not in scales.tensors:
        return None
    return scales.tensor(f"{linear}.columns"), scales.tensor(f"{linear}.rows")


def _fold_faults(scales: Checkpoint | None, linears: list[str]) -> Iterator[str]:
    """Scales that no tensor of the model absorbed would hide any change of its weights."""
    for linear in linears:
        found = _scales_of(scales, linear)
        if found is None:
            continue
        columns, rows = found
        if not all(bool((scale.isfinite() & (scale > 0)).all()) for scale in found):
            yield f"{linear}: its fold scales are not all above 0"
        layer, _, name = linear.rpartition(".self_attn.") if ".self_attn." in linear else linear.rpartition(".mlp.")
        part = f"{'self_attn' if '.self_attn.' in linear else 'mlp'}.{name}"
        for group in SAME_INPUT:
            first = _scales_of(scales, f"{layer}.{group[0]}")
            if part in group and first is not None and not torch.equal(first[0], columns):
                yield f"{linear}: its columns are scaled unlike those of {group[0]}, which has the same input"
        producer = {"mlp.down_proj": "mlp.up_proj", "self_attn.o_proj": "self_attn.v_proj"}.get(part)
        fed = _scales_of(scales, f"{layer}.{producer}") if producer else None
        if fed is not None and not set(columns.tolist()) <= set(fed[1].tolist()):
            yield f"{linear}: its columns are scaled otherwise than the rows of {producer}"
        if part not in ("mlp.up_proj", "self_attn.v_proj") and not bool((rows == 1).all()):
            yield f"{linear}: its rows are scaled, and nothing takes that back"


def _plain_faults(artifact: Artifact, source: Checkpoint, scales: Checkpoint | None) -> Iterator[str]:
    """Embeddings, norms, biases and head, as they were but for a fold scale and their type."""
    blocks = isinstance(artifact.weights, GgufFile)
    plus_one = 1.0 if adds_one(artifact.config) else 0.0
    linears = {f"{linear}.weight" for linear in artifact.linears()}
    seen: set[str] = set()
    four_norms = any(name.endswith("pre_feedforward_layernorm.weight") for name in source.tensors)
    for name, tensor in artifact.read():
        seen.add(name)
        if name in linears:
            continue
        info = source.tensors.get(name)
        if info is None or info.shape != tensor.shape:
            yield f"{name} is {list(tensor.shape)} here and {'missing' if info is None else list(info.shape)} there"
            continue
        was, now = source.tensor(name).float(), tensor.float()
        if name.endswith("norm.weight"):
            was, now = was + plus_one, now + plus_one
        scale = _absorbed(name, scales, four_norms)
        if scale is not None:
            now = now * scale
        limit = BLOCKS_TOLERANCE if blocks and now.ndim >= 2 else PLAIN_TOLERANCE
        error = float((now - was).norm() / was.norm().clamp_min(1e-30))
        if not error <= limit and not torch.equal(now, was):
            yield f"{name} is not the source's (differs by {error:.2%})"
    for name in source.tensors:
        if name.startswith("model.layers.") and name not in seen:
            yield f"{shown(name)} is in the source and not here"


def _absorbed(name: str, scales: Checkpoint | None, four_norms: bool) -> torch.Tensor | None:
    """What a norm or bias was divided by; None where it took no scale. ``four_norms``: of a layer that has one behind
    its attention too."""
    if scales is None:
        return None
    module, _, kind = name.rpartition(".")
    if kind == "bias":
        found = _scales_of(scales, module)
        return None if found is None else found[1]
    layer, _, norm = module.rpartition(".")
    if norm == "post_attention_layernorm" and four_norms:
        return None
    found = _scales_of(scales, f"{layer}.{NORMS[norm]}") if norm in NORMS else None
    return None if found is None else found[0]
