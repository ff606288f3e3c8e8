"""Checks of an artifact's tensors, which rest on the weights alone: whoever made a file may have written its manifest
too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import TensorInfo
from qtool.convert.files.writer import Spec
from qtool.convert.formats.gguf.file import GgufFile
from qtool.convert.formats.gguf.metadata import required_keys
from qtool.convert.formats.gguf.names import ROPE_FREQS
from qtool.convert.formats.gguf.types import tensor_types
from qtool.convert.models.table import find_family, gguf_facts
from qtool.convert.models.tied import EMBEDDING

Result = tuple[str, list[str], str]
FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LARGEST = 65504.0  # beyond it, kernels that compute in float16 see infinity
ZEROS = 0.99  # of a matrix's weights: nothing is left of it


def check_tensors(artifact: Artifact) -> Result:
    """Every linear of the manifest unpacks to its shape, with scales that are finite and not zero, and is no matrix of
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
    plain: list[str] = []
    for name, info in tensors.items():
        tensor = artifact.checkpoint.tensor(name)
        if info.dtype.is_floating_point and not bool(tensor.isfinite().all()):
            reasons.append(f"{name} holds NaN or Inf")
        if name not in parts:
            plain += plain_faults(name, tensor, artifact.config)
            if "dtype" in made and info.dtype != dtype:
                plain.append(f"{name} is {info.dtype}, expected {dtype}")
    for linear in linears:
        reasons += _linear_faults(artifact, linear, dtype)
    reasons += plain
    count = len(tensors)
    return "tensors", reasons, f"{count} tensors present and finite, {len(linears)} linears packed"


def _linear_faults(artifact: Artifact, linear: str, dtype: torch.dtype) -> list[str]:
    packed, tensors = artifact.packed, artifact.checkpoint.tensors
    try:
        expected = packed.container.specs(*packed.shape(linear), packed.section, dtype)
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
        codes = packed.codes(linear)
    except QtoolError as error:
        return [error.message]
    if getattr(codes, "g_idx", None) is not None and packed.section.get("desc_act") is False:
        reasons.append(f"{linear}.g_idx is out of order, and desc_act is false: kernels do not look at it")
    return reasons + list(hollow(linear, codes.dequantize()))


def _misfits(linear: str, expected: Mapping[str, Spec], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    for suffix, (dtype, shape) in expected.items():
        found = tensors.get(f"{linear}.{suffix}")
        if found is None:
            yield f"{linear}.{suffix} is missing"
        elif found.shape != shape:
            yield f"{linear}.{suffix} has shape {list(found.shape)}, expected {list(shape)}"
        elif found.dtype != dtype:
            yield f"{linear}.{suffix} is {found.dtype}, expected {dtype}"


def hollow(name: str, weight: torch.Tensor) -> Iterator[str]:
    """Ways in which a matrix, dequantized, holds nothing of a model."""
    low, high = (float(value) for value in weight.aminmax()) if weight.numel() else (0.0, 0.0)
    zeros = float((weight == 0).float().mean()) if weight.numel() else 1.0
    if not (abs(low) <= LARGEST and abs(high) <= LARGEST):  # NaN too
        yield f"{name} has weights from {low:.4g} to {high:.4g}: float16 ends at {LARGEST:.0f}"
    elif low == high == 0:
        yield f"{name} is all zero"
    elif low == high:
        yield f"{name} is {low:.4g} throughout"
    elif zeros > ZEROS:
        yield f"{name} is zero but for {1 - zeros:.2%} of its weights"


def plain_faults(name: str, tensor: torch.Tensor, config: Mapping[str, Any]) -> Iterator[str]:
    """Of a tensor that is not quantized."""
    if tensor.dtype not in FLOATS.values():
        yield f"{name} is {tensor.dtype}, which is no model's weight"
    elif tensor.ndim >= 2:
        yield from hollow(name, tensor.float())
    elif name.endswith("norm.weight") and not norm_offset(name, config) and not bool(tensor.any()):
        yield f"{name} is all zero"


def norm_offset(name: str, config: Mapping[str, Any]) -> float:
    """What the norm of a weight adds to it before it applies it; 0 where config.json is of no known family."""
    family = find_family(config)
    return family.norm_offset(name) if family else 0.0


def check_gguf(artifact: Artifact) -> Result:
    """Every tensor that the linears of the manifest imply, with the type of llama.cpp's rule, finite and no matrix of
    zeros; the keys that llama.cpp cannot do without."""
    assert artifact.manifest is not None
    assert isinstance(artifact.weights, GgufFile)
    file, config = artifact.weights, artifact.config
    wanted = {f"{linear}.weight" for linear in artifact.manifest.ledger} | {EMBEDDING}
    reasons = [f"{name} is missing" for name in sorted(wanted - set(file.hf_names()))]
    shapes = {name: shape for name, (_, shape) in file.layout.items()}
    made, facts, shape = artifact.manifest.output["type"], gguf_facts(config), file.decoder.shape
    for name, typed in tensor_types(shapes, made, shape.layers, facts.like_70b(shape)).items():
        found = file.layout[name][0]
        if name != ROPE_FREQS and found != typed.type:
            reasons.append(f"{name} is {found}, llama.cpp's rule for {made} says {typed.type}")
            continue
        values = file.blocks(name).dequantize()
        if not bool(values.isfinite().all()):
            reasons.append(f"{name} holds NaN or Inf")
        elif len(shapes[name]) >= 2:
            reasons += hollow(name, values)
        elif name.endswith("norm.weight") and not bool(values.any()):
            reasons.append(f"{name} is all zero")
    reasons += [f"the key {key} is missing" for key in required_keys(facts) if file.metadata(key) is None]
    reasons += _unlike_config(file, config)
    tokens = file.metadata("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    rows = shapes.get("token_embd.weight", (len(tokens),))[0]
    if len(tokens) != rows:
        reasons.append(f"{len(tokens)} tokens in the vocabulary, {rows} rows in token_embd.weight")
    return "tensors", reasons, f"{len(shapes)} tensors as llama.cpp's rules type them, finite; {len(tokens)} tokens"


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
