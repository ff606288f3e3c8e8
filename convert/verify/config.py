"""Checks of what an artifact says against what it holds: config.json, the manifest's error ledger and sizes, and how
much of the model is quantized at all."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.manifest import Manifest
from qtool.convert.files.reading import read_json, shown
from qtool.convert.files.shard_header import INDEX, SINGLE
from qtool.convert.formats.gguf.file import GgufFile
from qtool.convert.formats.gguf.names import ROPE_FREQS, possible_names
from qtool.convert.formats.gguf.types import PLAIN
from qtool.convert.formats.plan import QUANTIZED_SHARE
from qtool.convert.models.tied import EMBEDDING, HEAD
from qtool.convert.verify.implied import Implied, Shapes
from qtool.convert.verify.tensors import Result

ERROR = 0.99  # |W - Ŵ| / |W|: of nothing it is 1


def stored_shapes(artifact: Artifact) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the model's tensors under their names in checkpoints, a quantized linear's as its weight."""
    weights = artifact.weights
    if isinstance(weights, GgufFile):
        return {hf: weights.layout[name][1] for hf, name in weights.hf_names().items()}
    packed = artifact.packed
    linears = packed.names()
    parts = {f"{linear}.{suffix}" for linear in linears for suffix in packed.parts(linear)}
    shapes = {name: info.shape for name, info in weights.tensors.items() if name not in parts}
    return shapes | {f"{linear}.weight": packed.shape(linear) for linear in linears}


def check_config(artifact: Artifact, shapes: Shapes, model: Implied) -> Result:
    """config.json implies every tensor that is there, and every tensor that it implies is there, in its shape: a loader
    refuses what it has no place for, and fills what is missing with noise."""
    reasons = []
    weights = artifact.weights
    for name in [name for name in shapes if name not in model.shapes]:
        reasons.append(f"{name} is in the file, and config.json does not imply it: loaders refuse it or leave it out")
    if isinstance(weights, GgufFile):
        known = {*weights.hf_names().values(), ROPE_FREQS}
        strangers = [name for name in weights.tensors if name not in known]
        reasons += [f"{name} is in the file, and llama.cpp has no place for it" for name in strangers]
        expected = set(model.shapes) & set(possible_names(artifact.config))
    else:
        expected = set(model.shapes)
        reasons += _misplaced(weights)
    for name in sorted(expected):
        shape = model.shapes[name]
        if name not in shapes and name not in model.absent:
            reasons.append(f"{name} is missing, which config.json implies")
        elif name in shapes and shape is not None and shapes[name] != shape:
            reasons.append(f"{name} is {list(shapes[name])}, config.json implies {list(shape)}")
    twice = isinstance(weights, Checkpoint) and HEAD in model.absent and {HEAD, EMBEDDING} <= set(weights.tensors)
    if twice and not torch.equal(artifact.checkpoint.tensor(HEAD), artifact.checkpoint.tensor(EMBEDDING)):
        reasons.append(f"{HEAD} is unlike {EMBEDDING}, and config.json ties them")
    if not isinstance(weights, GgufFile):
        reasons += _section_faults(artifact)
    by_name = any(shape is None for shape in model.shapes.values())
    note = ", by their names alone: its code (auto_map) is not run" if by_name else ""
    return "config.json", reasons, f"implies the {len(shapes)} tensors that are there{note}"


def _misplaced(weights: Checkpoint) -> Iterator[str]:
    """Tensors that the index has in another shard, or not at all."""
    index = weights.path / INDEX
    if not index.exists() or not any(info.file.name != SINGLE for info in weights.tensors.values()):
        return
    places = read_json(index).get("weight_map") or {}
    for name, info in weights.tensors.items():
        if places.get(name) != info.file.name:
            yield f"{name} lies in {info.file.name}, {INDEX} says {places.get(name)}"


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
    for linear in packed.names():
        pattern = next((said for said in skipped if _skips(said, linear)), None)
        if pattern is not None:
            yield f"quantization_config leaves {linear} unquantized ({pattern!r}), and it is quantized"
            return


def _skips(said: str, module: str) -> bool:
    """Whether some loader takes ``said`` for ``module``: transformers and vLLM look for part of a name, for a whole
    name, or for a pattern."""
    if said.startswith("re:"):
        return said != "re:lm_head" and not re.fullmatch(r"re:[\w.*\\$^]{0,8}lm_head\$?", said)
    return said in module


def check_ledger(artifact: Artifact) -> Result:
    """The manifest names the error of every quantized matrix and of nothing else, and each is below 100 %; its sizes
    are those of the tensors."""
    manifest = artifact.manifest
    assert manifest is not None
    linears = artifact.linears()
    reasons = [f"the ledger does not name {name}" for name in linears if name not in manifest.ledger]
    others = sorted(set(manifest.ledger) - set(linears))
    reasons += [f"the ledger names {shown(name)}, which is not quantized here" for name in others]
    if not linears:
        reasons.append("no matrix is quantized")
    for name, record in manifest.ledger.items():
        if "frobenius" not in record:
            reasons.append(f"the ledger has no error (frobenius) of {name}")
        elif record["frobenius"] >= ERROR:
            reasons.append(f"{name} lost {record['frobenius']:.0%} (|W - Ŵ|/|W|): nothing of it is left")
    reasons += _sizes(artifact, manifest)
    return "error ledger", reasons, f"{len(manifest.ledger)} linears, each with its error"


def _sizes(artifact: Artifact, manifest: Manifest) -> Iterator[str]:
    weights = artifact.weights
    if isinstance(weights, GgufFile):
        nbytes = sum(int(tensor.nbytes) for tensor in weights.tensors.values())
    else:
        nbytes = sum(info.nbytes for info in weights.tensors.values())
    if manifest.tensor_bytes != nbytes:
        yield f"the manifest says tensor_bytes {manifest.tensor_bytes}, the tensors have {nbytes}"
    bits = 8 * manifest.tensor_bytes / max(manifest.parameters, 1)
    if abs(bits - manifest.bits_per_weight) > 1e-3 * max(bits, 1):
        yield f"the manifest says bits_per_weight {manifest.bits_per_weight}, its sizes give {bits:.4f}"


def check_share(artifact: Artifact, shapes: Shapes, model: Implied) -> Result | None:
    """At least 99 % of the bytes that are to be quantized are; what stays in 16 bits is named. None where the format
    itself has 16 bits."""
    weights = artifact.weights
    if isinstance(weights, GgufFile):
        assert artifact.manifest is not None
        if artifact.manifest.output["type"] in PLAIN:
            return None
        types = {hf: weights.layout[name][0] for hf, name in weights.hf_names().items()}
        plain = {hf for hf, type_name in types.items() if type_name in PLAIN}
        planned = [name for name in shapes if name in model.matrices or name in (EMBEDDING, HEAD)]
    else:
        packed = {f"{linear}.weight" for linear in artifact.packed.names()}
        planned = [name for name in model.matrices if name in shapes]
        plain = set(planned) - packed
    sizes = {name: shapes[name][0] * shapes[name][-1] for name in planned}
    left = [name for name in planned if name in plain]
    total = sum(sizes.values())
    share = 1 - sum(sizes[name] for name in left) / total if total else 0.0
    named = f"{', '.join(left[:3])}{f' and {len(left) - 3} more' if len(left) > 3 else ''} stay in 16 bits"
    reasons = []
    if share < QUANTIZED_SHARE:
        reasons = [f"{share:.1%} of what is to be quantized is; {named}" if left else "nothing is to be quantized"]
    return "quantized share", reasons, f"{share:.1%} of {total:,} weights" + (f"; {named}" if left else "")
