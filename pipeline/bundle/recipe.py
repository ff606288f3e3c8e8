"""A recipe of https://github.com/vllm-project/recipes (models/ORG/REPO.yaml, CONTRIBUTING.md says its keys).

Their "verified" is for cards on which somebody ran it: nothing here says so.
"""

from __future__ import annotations

import math
from typing import Any

from qtool import QtoolError
from qtool.bundle.kubernetes import OWN
from qtool.bundle.target import Target, as_words

# Their words for a precision, by quantization_config's quant_method; {bits}: of the weights.
PRECISIONS = {"awq": "awq", "gptq": "gptq", "compressed-tensors": "int{bits}", "": "bf16"}


def vllm_recipe(target: Target) -> dict[str, Any]:
    """Raises QtoolError for a format that their vocabulary has no word for."""
    assert target.repository is not None
    organisation, _, name = target.repository.partition("/")
    s, cell = target.server.serving, target.server.estimate
    image = target.server.facts.image
    weights = target.server.setting.weights
    parameters = _count(target)
    gigabytes = math.ceil(cell.total * s.cards / 1e9)
    return {
        "meta": {
            "title": name,
            "slug": target.label,
            "provider": organisation,
            "description": f"{name}: {weights.bits_per_weight:.2f} bits a weight, made by qtool.",
            "difficulty": "beginner",
            "tasks": ["text"],
        },
        "model": {
            "model_id": target.repository,
            "min_vllm_version": image.rpartition(":v")[2],
            "docker_image": image,
            "architecture": "dense",
            "parameter_count": parameters,
            "active_parameters": parameters,
            "context_length": target.server.headers.geometry.max_context or s.context,
            "base_args": as_words(target.flags(), OWN),
            "base_env": {},
        },
        "features": {},
        "opt_in_features": [],
        "variants": {"default": {
            "precision": _precision(target),
            "vram_minimum_gb": gigabytes,
            "description": f"planned by qtool for {target.planned}",
        }},
        "compatible_strategies": ["single_node_tp"],
        "strategy_overrides": {"single_node_tp": {"tp": s.cards}},
        "guide": f"## Overview\n\nPlanned: {target.planned}.\n\nNot run: configuration only.\n",
    }  # fmt: skip


def _precision(target: Target) -> str:
    section = target.artifact.quantization
    word = PRECISIONS.get(str(section.get("quant_method") or ""))
    if word is None:
        raise QtoolError(f"vllm-project/recipes has no word for {section.get('quant_method')}")
    groups = section.get("config_groups") or {}
    bits = next((group["weights"]["num_bits"] for group in groups.values()), None) if "{bits}" in word else ""
    return word.format(bits=bits)


def _count(target: Target) -> str:
    """`8.2B`, as theirs."""
    g, manifest = target.server.headers.geometry, target.artifact.manifest
    embeddings = g.vocab * g.hidden * (1 if g.tied else 2)
    number = manifest.parameters if manifest else g.layer_linears * g.layers + embeddings  # norms are left out
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return str(number)
