"""Checks of what an artifact's settings say: a .gguf file's keys against the config.json and the tokenizer beside it,
and every small file against the source's. Hashes cannot tell: whoever changes a file can write its new one down."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.folder import made_config
from qtool.convert.files.reading import read_bytes, read_json, shown
from qtool.convert.files.sidecars import carried_bytes, sidecars
from qtool.convert.formats import autoawq, autogptq, bnb_nf4, compressed_tensors
from qtool.convert.formats.gguf.chat_form import learn
from qtool.convert.formats.gguf.file import GgufFile, header_of
from qtool.convert.formats.gguf.header import read_header, read_value
from qtool.convert.formats.gguf.imatrix import IMATRIX, read_imatrix
from qtool.convert.formats.gguf.metadata import add_metadata
from qtool.convert.formats.gguf.modelfile import MODELFILE, modelfile_of
from qtool.convert.formats.gguf.stops import find_stops
from qtool.convert.formats.gguf.vocab import add_vocabulary
from qtool.convert.models.table import gguf_facts
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.verify.tensors import FLOATS, Result

KEYS = "keys of the file"
TOKENIZER = "tokenizer."
SETTINGS = "settings of the source"
FLOAT32 = 1e-6  # relative: what a key of 32 bits leaves of a number


def check_keys(artifact: Artifact) -> Result:
    """llama.cpp reads the .gguf file alone: each of its keys is written anew from the config.json and the tokenizer
    that lie beside it, and compared; so is the Modelfile. A tokenizer that is code of its own (auto_map) is not run."""
    file, manifest, config = artifact.weights, artifact.manifest, artifact.config
    assert isinstance(file, GgufFile)
    assert manifest is not None
    settings = artifact.path / "tokenizer_config.json"
    has_code = "auto_map" in config or (settings.exists() and "auto_map" in read_json(settings))
    tokenizer = None if has_code else load_tokenizer(artifact.path)
    made = manifest.output

    def describe(writer: Any) -> None:
        add_metadata(writer, config, str(manifest.source.get("name")), str(made.get("type")))
        if tokenizer is not None:
            add_vocabulary(writer, artifact.path, tokenizer, config, made.get("pre_tokenizer"))

    with tempfile.TemporaryDirectory(prefix="qtool-keys-") as folder:
        path = Path(folder) / "keys.gguf"
        path.write_bytes(header_of(path, gguf_facts(config).architecture, describe))
        expected = read_header(path)
        wanted = {key: read_value(path, expected, key) for key in expected.keys}
    reasons = [*_differences(file, wanted, "" if tokenizer is not None else TOKENIZER)]
    beside = artifact.path / MODELFILE
    if tokenizer is not None and beside.exists():
        stops = find_stops(artifact.path, tokenizer, config, int(config["vocab_size"]))
        text = modelfile_of(artifact.path, file.path.name, tokenizer, learn(tokenizer), stops).text
        if read_bytes(beside) != text.encode():
            reasons.append(f"{MODELFILE} is not what the tokenizer's chat template and stops make of it")
    if (artifact.path / IMATRIX).exists():
        names = {*file.hf_names().values()}
        reasons += [f"{IMATRIX} names {shown(name)}" for name in read_imatrix(artifact.path / IMATRIX).keys() - names]
    told = "config.json and the tokenizer say" if tokenizer is not None else "config.json says (its tokenizer is code)"
    return KEYS, reasons, f"{len(wanted)} keys as {told}"


def _differences(file: GgufFile, wanted: Mapping[str, Any], but: str) -> Iterator[str]:
    """``but``: how the keys begin that are not compared; empty for none."""
    there = set(file.keys)
    for key, value in wanted.items():
        if key not in there:
            yield f"the key {key} is missing"
        elif (found := file.metadata(key)) != value and not _close(found, value):
            yield f"{key} is {_told(found, value)}"
    for key in sorted(there - set(wanted)):
        if but and key.startswith(but):
            continue
        yield f"the key {shown(key)} is in the file, and nothing beside it says so"


def _close(found: Any, value: Any) -> bool:
    numbers = all(isinstance(number, float) for number in (found, value))
    return numbers and math.isclose(found, value, rel_tol=FLOAT32)


def _told(found: Any, value: Any) -> str:
    if not isinstance(found, list) or not isinstance(value, list):
        return f"{shown(repr(found))}, config.json and the tokenizer say {shown(repr(value))}"
    if len(found) != len(value):
        return f"a list of {len(found)}, the tokenizer says {len(value)}"
    at = next(number for number, (a, b) in enumerate(zip(found, value, strict=True)) if a != b)
    return f"{shown(repr(found[at]))} at {at}, the tokenizer says {shown(repr(value[at]))}"


def section_faults(artifact: Artifact) -> Iterator[str]:
    """quantization_config is what qtool writes for an output made as the manifest says."""
    assert artifact.manifest is not None
    expected = _section(artifact.manifest.output)
    for key, value in expected.items():
        found = artifact.quantization.get(key, ...)
        if found != value and key != "desc_act":  # once it told the order of rounding
            said = "is missing" if found is ... else f"is {shown(repr(found))}"
            yield f"quantization_config: {key} {said}, and the artifact was made with {shown(repr(value))}"


def _section(made: Mapping[str, Any]) -> dict[str, Any]:
    skipped = ["lm_head"]
    match made.get("method"), made.get("format"):
        case "awq", _:
            return autoawq.quantization_config(made["group_size"], skipped)
        case "gptq", "compressed-tensors":
            return compressed_tensors.quantization_config(
                made["bits"], made["group_size"], made["sym"], made["desc_act"]
            )
        case "gptq", _:
            return autogptq.quantization_config(made["bits"], made["group_size"], made["sym"], made["damp_percent"])
        case "nf4", _:
            return bnb_nf4.quantization_config(made["double_quant"], skipped)
    return {}


def check_settings(artifact: Artifact, source: Checkpoint) -> Result:
    """config.json says what the source's does, and tokenizer, templates and generation settings are the source's own,
    byte for byte but for private paths."""
    assert artifact.manifest is not None
    made, here = artifact.manifest.output, artifact.config
    dtype = FLOATS.get(str(made.get("dtype")))
    expected = made_config(source.path, artifact.quantization, dtype)
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
