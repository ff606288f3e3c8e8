"""What llama.cpp's single file is among the formats: who reads it. Its own keys say everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from qtool import QtoolError
from qtool.convert.runtimes.rule import Runtime, RuntimeRule

SAFETENSORS: Literal[False] = False
RUNS_IN: tuple[Runtime, ...] = (Runtime("llama.cpp", "llama.cpp"),)
RULES: tuple[RuntimeRule, ...] = ()  # llama.cpp takes what its own types and keys say; `qtool verify` checks those


def stores(made: Mapping[str, Any]) -> bool:
    """Whether an output that a manifest tells of lies in this format."""
    return bool(made.get("method") == "gguf")


def mix_of(made: Mapping[str, Any]) -> dict[str, str] | None:
    """Module -> type, where an output of types by budget says so; None for a file of one rule. Raises QtoolError for
    what is no mix."""
    mix = made.get("mix")
    if mix is None:
        return None
    if not isinstance(mix, dict) or not all(isinstance(kind, str) for kind in mix.values()):
        raise QtoolError("the output's `mix` is no list of modules and their types.")
    return mix


def section_of(made: Mapping[str, Any]) -> dict[str, Any]:
    """Empty: the file says it itself."""
    return {}
