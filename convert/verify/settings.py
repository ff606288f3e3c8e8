"""Checks of what an artifact's settings say: its quantization_config against its manifest, and every small file
against the source's. Hashes cannot tell: whoever changes a file can write its new one down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.config_file import read_config
from qtool.convert.files.folder import made_config
from qtool.convert.files.reading import read_bytes, shown
from qtool.convert.files.sidecars import carried_bytes, sidecars
from qtool.convert.formats.shards import section_for
from qtool.convert.formats.table import format_of
from qtool.convert.models.model_config import runtime_keys
from qtool.convert.models.shape import decoder_of
from qtool.convert.verify.tensors import FLOATS, Result

SETTINGS = "settings of the source"


def section_faults(artifact: Artifact) -> Iterator[str]:
    """quantization_config is what qtool writes for an output made as the manifest says."""
    assert artifact.manifest is not None
    made = format_of(artifact.manifest.output)
    expected = {} if made is None else made.section_of(artifact.manifest.output)
    if made is not None and made.SAFETENSORS:
        expected, _ = section_for(expected, artifact.manifest.output, decoder_of(artifact.config))
    for key, value in expected.items():
        found = artifact.quantization.get(key, ...)
        if found != value and key != "desc_act":  # once it told the order of rounding
            said = "is missing" if found is ... else f"is {shown(repr(found))}"
            yield f"quantization_config: {key} {said}, and the artifact was made with {shown(repr(value))}"


def check_settings(artifact: Artifact, source: Checkpoint) -> Result:
    """config.json says what the source's does, and tokenizer, templates and generation settings are the source's own,
    byte for byte but for private paths."""
    assert artifact.manifest is not None
    made, here = artifact.manifest.output, artifact.config
    dtype = FLOATS.get(str(made.get("dtype")))
    expected = made_config(source.path, artifact.quantization, dtype, runtime_keys(read_config(source.path)))
    reasons = [
        f"config.json: {shown(key)} is {_value(here, key)}, the source says {_value(expected, key)}"
        for key in sorted(set(expected) | set(here))
        if here.get(key, ...) != expected.get(key, ...)
    ]
    with_code = any(name.endswith(".py") for name in artifact.manifest.files)
    names = set()
    for path in sidecars(source.path, with_code):
        name = path.relative_to(source.path).as_posix()
        names.add(name)
        copy = artifact.path / name
        if not copy.exists():
            reasons.append(f"{name} is the source's and not here")
        elif read_bytes(copy) != carried_bytes(path):
            reasons.append(f"{name} is not the source's")
    own = {path.relative_to(artifact.path).as_posix() for path in sidecars(artifact.path, with_code)}
    reasons += [f"{shown(name)} is here and not the source's" for name in sorted(own - names)]
    return SETTINGS, reasons, f"config.json and {len(names)} files as the source has them"


def _value(config: Mapping[str, Any], key: str) -> str:
    return shown(repr(config[key])) if key in config else "missing"
