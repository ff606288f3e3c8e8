"""Checks of what an artifact says against what it holds: config.json, the manifest's error ledger and sizes, and how
much of the model is quantized at all."""

from __future__ import annotations

from collections.abc import Iterator

from qtool.convert.artifact import Artifact
from qtool.convert.files.manifest import Manifest
from qtool.convert.files.reading import shown
from qtool.convert.formats.plan import QUANTIZED_SHARE
from qtool.convert.verify.implied import Implied, Shapes
from qtool.convert.verify.tensors import Result
from qtool.convert.verify.way import way_of

ERROR = 0.99  # |W - Ŵ| / |W|: of nothing it is 1


def check_config(artifact: Artifact, shapes: Shapes, model: Implied) -> Result:
    """config.json implies every tensor that is there, and every tensor that it implies is there, in its shape: a loader
    refuses what it has no place for, and fills what is missing with noise."""
    way = way_of(artifact)
    reasons = []
    for name in [name for name in shapes if name not in model.shapes]:
        reasons.append(f"{name} is in the file, and config.json does not imply it: loaders refuse it or leave it out")
    reasons += way.misplaced(artifact)
    for name in sorted(way.expected(artifact, model)):
        shape = model.shapes[name]
        if name not in shapes and name not in model.absent:
            reasons.append(f"{name} is missing, which config.json implies")
        elif name in shapes and shape is not None and shapes[name] != shape:
            reasons.append(f"{name} is {list(shapes[name])}, config.json implies {list(shape)}")
    reasons += way.config_faults(artifact, model)
    by_name = any(shape is None for shape in model.shapes.values())
    note = ", by their names alone: its code (auto_map) is not run" if by_name else ""
    return "config.json", reasons, f"implies the {len(shapes)} tensors that are there{note}"


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
    nbytes = artifact.weights.nbytes
    if manifest.tensor_bytes != nbytes:
        yield f"the manifest says tensor_bytes {manifest.tensor_bytes}, the tensors have {nbytes}"
    bits = 8 * manifest.tensor_bytes / max(manifest.parameters, 1)
    if abs(bits - manifest.bits_per_weight) > 1e-3 * max(bits, 1):
        yield f"the manifest says bits_per_weight {manifest.bits_per_weight}, its sizes give {bits:.4f}"


def check_share(artifact: Artifact, shapes: Shapes, model: Implied) -> Result | None:
    """At least 99 % of the bytes that are to be quantized are; what stays in 16 bits is named. None where the format
    itself has 16 bits."""
    found = way_of(artifact).share(artifact, shapes, model)
    if found is None:
        return None
    planned, plain = found
    sizes = {name: shapes[name][0] * shapes[name][-1] for name in planned}
    left = [name for name in planned if name in plain]
    total = sum(sizes.values())
    share = 1 - sum(sizes[name] for name in left) / total if total else 0.0
    asked = sum(name in shapes and name not in sizes for name in model.matrices)
    told = f"; {asked} linears stay in 16 bits as asked" if asked else ""
    named = f"{', '.join(left[:3])}{f' and {len(left) - 3} more' if len(left) > 3 else ''} stay in 16 bits"
    reasons = []
    if share < QUANTIZED_SHARE:
        reasons = [f"{share:.1%} of what is to be quantized is; {named}" if left else "nothing is to be quantized"]
    return "quantized share", reasons, f"{share:.1%} of {total:,} weights{told}" + (f"; {named}" if left else "")
