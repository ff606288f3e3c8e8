"""How an artifact in safetensors files is checked, whatever container its linears lie in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.reading import read_json, shown
from qtool.convert.files.shard_header import INDEX, SINGLE
from qtool.convert.files.tensor_info import TensorInfo
from qtool.convert.files.workers import workers
from qtool.convert.files.writer import Spec
from qtool.convert.formats.shards import section_for
from qtool.convert.models.shape import decoder_of
from qtool.convert.models.table import find_family
from qtool.convert.models.tied import EMBEDDING, HEAD
from qtool.convert.runtimes import vllm
from qtool.convert.verify.implied import Implied, Shapes
from qtool.convert.verify.tensors import (
    CPU,
    FLOATS,
    PIECE,
    PLAIN_TOLERANCE,
    Check,
    Result,
    Seen,
    hollow,
    plain_faults,
    see,
    see_codes,
)

FURTHER: tuple[tuple[str, Check], ...] = ()
TABLE_TOLERANCE = PLAIN_TOLERANCE
AT_ONCE = 8  # linears: of each two bytes a weight are in memory, and a `PIECE` dequantized


def check_tensors(artifact: Artifact, device: torch.device = CPU) -> Result:
    """Every linear of the manifest unpacks to its shape with scales that are finite and not zero, and is no matrix of
    zeros; every other tensor is finite and of a type that models are stored in."""
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
    dtype = FLOATS.get(str(made.get("dtype")), torch.float32)
    parts = {f"{linear}.{suffix}" for linear in linears for suffix in packed.parts(linear)}
    with workers("verifying", AT_ONCE) as pool:
        looked = pool.map(lambda name: _look(artifact.checkpoint, name, name in parts, device), tensors)
        seen = dict(zip(tensors, looked, strict=True))
        faults = list(pool.map(lambda linear: _linear_faults(artifact, linear, dtype, device), linears))
    plain: list[str] = []
    family = find_family(artifact.config)
    for name, info in tensors.items():
        if info.dtype.is_floating_point and not seen[name].finite:
            reasons.append(f"{name} holds NaN or Inf")
        if name not in parts:
            plain += plain_faults(name, info.dtype, len(info.shape), seen[name], artifact.config)
            if "dtype" in made and info.dtype != dtype and (family is None or family.casts(name)):
                plain.append(f"{name} is {info.dtype}, expected {dtype}")
    reasons += [fault for found in faults for fault in found]
    reasons += plain
    count = len(tensors)
    return "tensors", reasons, f"{count} tensors present and finite, {len(linears)} linears packed"


def _look(checkpoint: Checkpoint, name: str, part: bool, device: torch.device) -> Seen:
    """A tensor, some rows at a time. Integers that are part of a linear are looked at with that."""
    info = checkpoint.tensors[name]
    if not info.dtype.is_floating_point and part:
        return Seen()
    rows = info.shape[0] if info.shape else 1
    step = max(1, PIECE[device.type] * rows * info.dtype.itemsize // max(1, info.nbytes))
    wide = torch.float32 if info.dtype in FLOATS.values() else torch.float64
    pieces = (checkpoint.part(name, first, first + step) for first in range(0, rows, step))
    return see(piece.to(device).to(wide) for piece in pieces)


def _linear_faults(artifact: Artifact, linear: str, dtype: torch.dtype, device: torch.device) -> list[str]:
    packed, tensors = artifact.packed, artifact.checkpoint.tensors
    try:
        expected = packed.container.specs(*packed.shape(linear), packed.own(linear), dtype)
    except (KeyError, ValueError, TypeError, ArithmeticError, QtoolError) as error:
        return [f"{linear} cannot be read: {error}"]
    reasons = [*_misfits(linear, expected, tensors)]
    for suffix in packed.container.POSITIVE:
        name = f"{linear}.{suffix}"
        if name in tensors and not bool((artifact.checkpoint.tensor(name) > 0).all()):
            reasons.append(f"{name} holds zeros or negative numbers")
    for suffix in packed.container.NONZERO:
        name = f"{linear}.{suffix}"
        if name in tensors and not bool(artifact.checkpoint.tensor(name).all()):
            reasons.append(f"{name} holds zeros")
    if reasons:
        return reasons
    try:
        codes = packed.codes(linear, device)
    except QtoolError as error:
        return [error.message]
    if getattr(codes, "g_idx", None) is not None and packed.section.get("desc_act") is False:
        reasons.append(f"{linear}.g_idx is out of order, and desc_act is false: kernels do not look at it")
    return reasons + list(hollow(linear, see_codes(codes)))


def _misfits(linear: str, expected: Mapping[str, Spec], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    for suffix, (dtype, shape) in expected.items():
        found = tensors.get(f"{linear}.{suffix}")
        if found is None:
            yield f"{linear}.{suffix} is missing"
        elif found.shape != shape:
            yield f"{linear}.{suffix} has shape {list(found.shape)}, expected {list(shape)}"
        elif found.dtype != dtype:
            yield f"{linear}.{suffix} is {found.dtype}, expected {dtype}"


def expected(artifact: Artifact, model: Implied) -> set[str]:
    """All that config.json implies."""
    return set(model.shapes)


def misplaced(artifact: Artifact) -> Iterator[str]:
    """Tensors that the index has in another shard, or not at all."""
    weights = artifact.checkpoint
    index = weights.path / INDEX
    if not index.exists() or not any(info.file.name != SINGLE for info in weights.tensors.values()):
        return
    places = read_json(index).get("weight_map") or {}
    for name, info in weights.tensors.items():
        if places.get(name) != info.file.name:
            yield f"{name} lies in {info.file.name}, {INDEX} says {places.get(name)}"


def config_faults(artifact: Artifact, model: Implied) -> Iterator[str]:
    """What config.json says that makes a loader read these tensors otherwise."""
    checkpoint = artifact.checkpoint
    twice = HEAD in model.absent and {HEAD, EMBEDDING} <= set(checkpoint.tensors)
    if twice and not torch.equal(checkpoint.tensor(HEAD), checkpoint.tensor(EMBEDDING)):
        yield f"{HEAD} is unlike {EMBEDDING}, and config.json ties them"
    yield from _section_faults(artifact)


def share(artifact: Artifact, shapes: Shapes, model: Implied) -> tuple[list[str], set[str]]:
    """(what is to be quantized, what of it is not)."""
    plain = _asked_plain(artifact)
    planned = [name for name in model.matrices if name in shapes and name.removesuffix(".weight") not in plain]
    return planned, set(planned) - {f"{linear}.weight" for linear in artifact.packed.names()}


def _asked_plain(artifact: Artifact) -> set[str]:
    """Linears that stay in 16 bits because the manifest says that they were asked to."""
    assert artifact.manifest is not None
    _, apart = section_for(artifact.quantization, artifact.manifest.output, decoder_of(artifact.config))
    return {linear for linear, own in apart.items() if own is None}


def _section_faults(artifact: Artifact) -> Iterator[str]:
    """What quantization_config says that makes a loader read these tensors otherwise."""
    packed = artifact.packed
    unknown = sorted(set(packed.section) - packed.container.KEYS)
    if unknown:
        yield f"quantization_config says {', '.join(map(str, unknown))}, which this format of qtool's does not have"
    try:
        skipped = packed.container.skipped(packed.section)
    except QtoolError as error:
        yield error.message
        return
    known = {"lm_head", *vllm.named(name.removesuffix(".weight") for name in artifact.weights.shapes())}
    for said in skipped:
        if not said.startswith("re:") and not any(said in module for module in known):
            yield f"quantization_config leaves {shown(said)} unquantized, and the model has no such module"
    plain = _asked_plain(artifact)
    for linear in plain - set(skipped):
        yield f"{shown(linear)} stays in 16 bits, and quantization_config does not say so"
    for linear in plain & set(packed.names()):
        yield f"{shown(linear)} is quantized, and the artifact was made with it in 16 bits"
    for linear in packed.names():
        pattern = next((said for said in skipped if _skips(said, linear)), None)
        if pattern is not None:
            yield f"quantization_config leaves {linear} unquantized ({pattern!r}), and it is quantized"
            return


def _skips(said: str, module: str) -> bool:
    """Whether some loader takes ``said`` for ``module``: transformers and vLLM look for part of a name, for a whole
    name, or for a pattern."""
    if part := re.fullmatch(r"re:\.\*(\w+)\.\*", said):
        return part[1] in module
    if said.startswith("re:"):
        return said != "re:lm_head" and not re.fullmatch(r"re:[\w.*\\$^]{0,8}lm_head\$?", said)
    return said in module
