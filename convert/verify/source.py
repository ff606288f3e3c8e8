"""The check of an artifact against its source: every tensor, quantized or not, is what the manifest says it became."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.config_file import read_config
from qtool.convert.files.folder import EXTRAS, FOLD_SCALES
from qtool.convert.files.reading import shown
from qtool.convert.files.small_floats import without_small_floats
from qtool.convert.models.feeds import Heads, Norm, Rows, whole
from qtool.convert.models.fused import open_model
from qtool.convert.models.shape import Decoder, decoder_of
from qtool.convert.verify.tensors import PLAIN_TOLERANCE, Result
from qtool.convert.verify.way import way_of

AGAINST_SOURCE = "error against the source"
FROBENIUS_TOLERANCE = 1e-3  # relative; float32 sums in another order move the sixth digit
Scales = tuple[torch.Tensor, torch.Tensor]


def open_source(artifact: Path, source: Path) -> Checkpoint:
    """Raises QtoolError for the artifact itself and for a model that is quantized already."""
    if source.is_dir() and source.resolve() == artifact.resolve():
        raise QtoolError(f"{source}: is the artifact itself. --source wants the model that it was made from.")
    opened = open_model(source)
    if without_small_floats(read_config(source)).get("quantization_config"):
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
    decoder = decoder_of(artifact.config)
    held = {module: (name, matrix) for name, pairs in decoder.held().items() for module, matrix in pairs}
    reasons = [] if linears else ["no linear to compare"]
    for linear in linears:
        name, matrix = held.get(linear, (f"{linear}.weight", whole(linear)))
        info, quantized = source.tensors.get(name), artifact.codes(linear).dequantize()
        if info is None or len(info.shape) < 2 or matrix.shape(info.shape) != quantized.shape:
            found = "no such tensor" if info is None else f"{list(info.shape)}"
            reasons.append(f"{linear} is {list(quantized.shape)} here and {found} there: not its source")
            continue
        weight = matrix.of(source.tensor(name)).float()
        error = relative_frobenius(weight, quantized, _scales_of(scales, linear))
        said = ledger.get(linear, {}).get("frobenius")
        if said is None:
            reasons.append(f"{linear}: |W - Ŵ|/|W| is {error:.4g}, the manifest says nothing")
        elif not math.isfinite(error) or not abs(error - said) <= FROBENIUS_TOLERANCE * max(said, 1e-6):
            reasons.append(f"{linear}: |W - Ŵ|/|W| is {error:.4g}, the manifest says {said:.4g}")
    if not reasons:  # else it is another model's source
        reasons = [*_fold_faults(scales, list(held), decoder), *_plain_faults(artifact, source, scales, decoder)]
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


def _fold_faults(scales: Checkpoint | None, linears: list[str], decoder: Decoder) -> Iterator[str]:
    """Scales that no tensor of the model absorbed would hide any change of its weights."""
    there: dict[str, Scales] = {}
    for linear in linears:
        found = _scales_of(scales, linear)
        if found is not None:
            there[linear] = found
            if not all(bool((scale.isfinite() & (scale > 0)).all()) for scale in found):
                yield f"{linear}: its fold scales are not all above 0"
    producers: set[str] = set()
    for layer in range(decoder.shape.layers if there else 0):
        at = decoder.at(layer)
        for feed in decoder.feeds(layer):
            first = there.get(at + feed.name)
            if first is None:
                continue
            for matrix in feed.consumers[1:]:
                other = there.get(at + matrix.module)
                if other is not None and not torch.equal(other[0], first[0]):
                    name = at + matrix.module
                    yield f"{name}: its columns are scaled unlike those of {feed.name}, which has the same input"
            match feed.producer:
                case Rows(made) | Heads(made):
                    producers.add(at + made.module)
                    fed = there.get(at + made.module)
                    if fed is not None and not set(first[0].tolist()) <= set(fed[1].tolist()):
                        yield f"{at}{feed.name}: its columns are scaled otherwise than the rows of {made.module}"
    for linear, (_, made_rows) in there.items():
        if linear not in producers and not bool((made_rows == 1).all()):
            yield f"{linear}: its rows are scaled, and nothing takes that back"


def _plain_faults(artifact: Artifact, source: Checkpoint, scales: Checkpoint | None, decoder: Decoder) -> Iterator[str]:
    """Embeddings, norms, biases and head, as they were but for a fold scale and their type."""
    tables = way_of(artifact).TABLE_TOLERANCE
    linears = {f"{linear}.weight" for linear in artifact.linears()}
    absorbed = {} if scales is None else _absorbed(scales, decoder)
    seen: set[str] = set()
    for name, tensor in artifact.read():
        seen.add(name)
        if name in linears:
            continue
        info = source.tensors.get(name)
        if info is None or info.shape != tensor.shape:
            yield f"{name} is {list(tensor.shape)} here and {'missing' if info is None else list(info.shape)} there"
            continue
        offset = decoder.family.norm_offset(name)
        was, now = source.tensor(name).float() + offset, tensor.float() + offset
        if name in absorbed:
            now = now * absorbed[name]
        if (own := _scales_of(scales, name.removesuffix(".weight"))) is not None:  # a linear that stays in 16 bits
            now = now / own[0] * own[1].unsqueeze(1)
        limit = tables if now.ndim >= 2 else PLAIN_TOLERANCE
        error = float((now - was).norm() / was.norm().clamp_min(1e-30))
        if not error <= limit and not torch.equal(now, was):
            yield f"{name} is not the source's (differs by {error:.2%})"
    seen |= set(decoder.held())  # compared as matrices
    for name in source.tensors:
        if name.startswith(decoder.prefix) and name not in seen and not decoder.is_draft(name):
            yield f"{shown(name)} is in the source and not here"


def _absorbed(scales: Checkpoint, decoder: Decoder) -> dict[str, torch.Tensor]:
    """Tensor that is not quantized -> what it has to be multiplied by to be the source's again: a norm by the scale of
    what it feeds, a bias by that of its matrix's rows; what only takes a scale, by its inverse."""
    found: dict[str, torch.Tensor] = {}
    for layer in range(decoder.shape.layers):
        at = decoder.at(layer)
        for matrix in decoder.matrices(layer):
            own = _scales_of(scales, at + matrix.module)
            if own is not None:
                found[f"{at}{matrix.module}.bias"] = own[1]
        for feed in decoder.feeds(layer):
            own = _scales_of(scales, at + feed.name)
            if own is None:
                continue
            columns = own[0]
            found |= {at + name: 1 / columns for name in feed.also}
            match feed.producer:
                case Norm(name):
                    tie = feed.producer.ties(columns.numel(), columns.device)
                    if tie is not None:
                        columns = columns.new_ones(feed.producer.repeated or 0).index_copy_(0, tie, columns)
                    found |= {f"{at}{name}.weight": columns, f"{at}{name}.bias": columns}
    return found
