"""What llama.cpp's single file is among the formats: who reads it. Its own keys say everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from qtool.convert.runtimes.rule import Runtime, RuntimeRule

SAFETENSORS: Literal[False] = False
RUNS_IN: tuple[Runtime, ...] = (Runtime("llama.cpp", "llama.cpp"),)
RULES: tuple[RuntimeRule, ...] = ()  # llama.cpp takes what its own types and keys say; `qtool verify` checks those


def stores(made: Mapping[str, Any]) -> bool:
    """Whether an output that a manifest tells of lies in this format."""
    return bool(made.get("method") == "gguf")


def section_of(made: Mapping[str, Any]) -> dict[str, Any]:
    """Empty: the file says it itself."""
    return {}
