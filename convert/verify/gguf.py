"""How a .gguf artifact is checked: its tensors, and its keys against the config.json and the tokenizer beside it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qtool.convert.artifact import Artifact
from qtool.convert.files.reading import read_bytes, read_json, shown
from qtool.convert.files.workers import workers
from qtool.convert.formats.apart import find_apart
from qtool.convert.formats.gguf.chat_form import learn
from qtool.convert.formats.gguf.file import GgufFile, header_of
from qtool.convert.formats.gguf.header import read_header, read_value
from qtool.convert.formats.gguf.imatrix import IMATRIX, read_imatrix
from qtool.convert.formats.gguf.metadata import add_metadata, required_keys
from qtool.convert.formats.gguf.modelfile import MODELFILE, modelfile_of
from qtool.convert.formats.gguf.names import ROPE_FREQS, STACKED, piece, possible_names
from qtool.convert.formats.gguf.plan import typed_tensors
from qtool.convert.formats.gguf.stops import find_stops
from qtool.convert.formats.gguf.stored import mix_of
from qtool.convert.formats.gguf.types import (
    PLAIN,
    Typed,
    file_type_of,
    mixed_types,
    plain_type,
    tensor_types,
    types_apart,
)
from qtool.convert.formats.gguf.vocab import add_vocabulary
from qtool.convert.models.config_keys import window_limits
from qtool.convert.models.table import gguf_facts
from qtool.convert.models.tied import EMBEDDING, HEAD
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.verify.implied import Implied, Shapes
from qtool.convert.verify.tensors import CPU, Check, Result, Seen, hollow, see_codes

KEYS = "keys of the file"
TOKENIZER = "tokenizer."
FLOAT32 = 1e-6  # relative: what a key of 32 bits leaves of a number
AT_ONCE = 1 << 23  # weights that are read at a time
TABLE_TOLERANCE = 0.15  # of an embedding in a GGUF type; Q4_K's error is below 0.1


def check_tensors(artifact: Artifact, device: torch.device = CPU) -> Result:
    """Every tensor that the linears of the manifest imply, with the type of llama.cpp's rule, finite and no matrix of
    zeros; the keys that llama.cpp cannot do without."""
    assert artifact.manifest is not None
    file, config = artifact.file, artifact.config
    wanted = {f"{linear}.weight" for linear in artifact.manifest.ledger} | {EMBEDDING}
    reasons = [f"{name} is missing" for name in sorted(wanted - set(file.hf_names()))]
    shapes = {name: shape for name, (_, shape) in file.layout.items()}
    made, facts = artifact.manifest.output, gguf_facts(config)
    typed, rule = _typed(file, made, shapes)
    known = [name for name in shapes if name == ROPE_FREQS or file.layout[name][0] == typed[name].type]
    seen = _seen(file, known, device)
    for name in shapes:
        found = file.layout[name][0]
        if name not in seen:
            reasons.append(f"{name} is {found}, {rule} says {typed[name].type}")
            continue
        for told, one in seen[name]:
            if not one.finite:
                reasons.append(f"{told} holds NaN or Inf")
            elif len(shapes[name]) >= 2:
                reasons += hollow(told, one)
            elif name.endswith("norm.weight") and one.zeros == one.count:
                reasons.append(f"{told} is all zero")
    reasons += [f"the key {key} is missing" for key in required_keys(facts) if file.metadata(key) is None]
    reasons += _unlike_config(file, config)
    tokens = file.metadata("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    rows = shapes.get("token_embd.weight", (len(tokens),))[0]
    if len(tokens) != rows:
        reasons.append(f"{len(tokens)} tokens in the vocabulary, {rows} rows in token_embd.weight")
    by = "llama.cpp's rules type" if made.get("mix") is None else "the manifest's mix types"
    return "tensors", reasons, f"{len(shapes)} tensors as {by} them, finite; {len(tokens)} tokens"


def _typed(file: GgufFile, made: Mapping[str, Any], shapes: Shapes) -> tuple[dict[str, Typed], str]:
    """(the type of every tensor as the manifest's output wants it, what says so in messages)."""
    mix = mix_of(made)
    if mix is None:
        facts, shape = gguf_facts(file.config), file.decoder.shape
        types = tensor_types(shapes, made["type"], shape.layers, facts.like_70b(shape), shape.experts)
        types = types_apart(types, shapes, file.hf_names(), made, plain_type(file.config))
        return types, f"llama.cpp's rule for {made['type']}, or the recipe,"
    given = typed_tensors(file.hf_names(), mix)
    return mixed_types(shapes, dict.fromkeys(shapes, "no type") | given), "the manifest's mix"


def _seen(file: GgufFile, names: Sequence[str], device: torch.device) -> dict[str, list[tuple[str, Seen]]]:
    """Tensor -> (its name, what is seen of it), of a stack for each expert. All processors look at parts of rows; each
    holds `AT_ONCE` weights in blocks, and a `PIECE` of them dequantized."""
    parts: list[tuple[str, int | None, int, int]] = []
    for name in names:
        *stack, rows, columns = (1, *file.layout[name][1])[-3:]
        experts = range(stack[0]) if name.endswith(STACKED) and len(file.layout[name][1]) == 3 else (None,)
        step = max(1, AT_ONCE // columns)
        parts += [
            (name, expert, first, min(first + step, rows)) for expert in experts for first in range(0, rows, step)
        ]
    with workers("verifying") as pool:
        looked = list(pool.map(lambda part: see_codes(file.blocks(part[0], part[1], part[2:]).to(device)), parts))
    found: dict[str, dict[str, Seen]] = {name: {} for name in names}
    for (name, expert, *_), one in zip(parts, looked, strict=True):
        told = piece(name, expert)
        found[name][told] = found[name].get(told, Seen()).with_(one)
    return {name: list(by_expert.items()) for name, by_expert in found.items()}


def _unlike_config(file: GgufFile, config: Mapping[str, Any]) -> Iterator[str]:
    """llama.cpp reads the file's own keys, every other check config.json: they have to be of one model."""
    architecture = gguf_facts(config).architecture
    heads = config.get("num_attention_heads")
    said = {
        "general.architecture": architecture,
        f"{architecture}.block_count": config.get("num_hidden_layers"),
        f"{architecture}.embedding_length": config.get("hidden_size"),
        f"{architecture}.feed_forward_length": config.get("intermediate_size"),
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": config.get("num_key_value_heads") or heads,
    }
    for key, value in said.items():
        found = file.metadata(key)
        if value is not None and found is not None and found != value:
            yield f"{key} is {found}, config.json says {value}"


def check_keys(artifact: Artifact) -> Result:
    """llama.cpp reads the .gguf file alone: each of its keys is written anew from the config.json and the tokenizer
    that lie beside it, and compared; so is the Modelfile. A tokenizer that is code of its own (auto_map) is not run."""
    file, manifest, config = artifact.file, artifact.manifest, artifact.config
    assert manifest is not None
    settings = artifact.path / "tokenizer_config.json"
    has_code = "auto_map" in config or (settings.exists() and "auto_map" in read_json(settings))
    tokenizer = None if has_code else load_tokenizer(artifact.path)
    made = manifest.output

    def describe(writer: Any) -> None:
        file_type = file_type_of(file.layout) if made.get("mix") is not None else str(made.get("type"))
        add_metadata(writer, config, str(manifest.source.get("name")), file_type)
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
    return KEYS, reasons, "; ".join([f"{len(wanted)} keys as {told}", *window_limits(config)])


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


def expected(artifact: Artifact, model: Implied) -> set[str]:
    """What config.json implies and llama.cpp has a name for."""
    return set(model.shapes) & set(possible_names(artifact.config))


def misplaced(artifact: Artifact) -> Iterator[str]:
    """Tensors that llama.cpp does not know."""
    known = {*artifact.file.hf_names().values(), ROPE_FREQS}
    for name in artifact.file.tensors:
        if name not in known:
            yield f"{name} is in the file, and llama.cpp has no place for it"


def config_faults(artifact: Artifact, model: Implied) -> Iterator[str]:
    """None: llama.cpp reads the file's own keys."""
    return iter(())


def share(artifact: Artifact, shapes: Shapes, model: Implied) -> tuple[list[str], set[str]] | None:
    """(what is to be quantized, embeddings and head among it; what of it is not). None where the file was to have 16
    bits."""
    assert artifact.manifest is not None
    made, file = artifact.manifest.output, artifact.file
    if made.get("type") in PLAIN:
        return None
    wished = {f"{module}.weight" for module, kind in (mix_of(made) or {}).items() if kind in PLAIN}
    plain = {hf for hf, name in file.hf_names().items() if file.layout[name][0] in PLAIN}
    meant = [name for name in shapes if name in model.matrices or name in (EMBEDDING, HEAD)]
    apart = find_apart(made, [name.removesuffix(".weight") for name in meant])
    wished |= {f"{linear}.weight" for linear, own in apart.items() if own is None or own.get("type") in PLAIN}
    return [name for name in meant if name not in wished], plain - wished


FURTHER: tuple[tuple[str, Check], ...] = ((KEYS, check_keys),)
