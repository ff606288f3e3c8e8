"""Hostile and damaged inputs, kept as builders: each makes one bad input from small good ones and says which command
meets it. `scripts/check_hostile.py` runs all of them, tests/test_attacks.py one of a kind.

One module a kind, each with `attacks()`. A good answer is an exit code that the attack names, one short message that
names the file, no traceback, no code of the input's run, bounded time and memory.
"""

from __future__ import annotations

from attacks import (
    calibrations,
    configs,
    ggufs,
    imatrices,
    indexes,
    links,
    manifests,
    odd_names,
    recipes,
    runs,
    safetensors_files,
    special_files,
    tasks,
    templates,
    tokenizers,
)
from attacks.bench import Attack

MODULES = (
    safetensors_files,
    indexes,
    configs,
    tokenizers,
    templates,
    recipes,
    calibrations,
    tasks,
    imatrices,
    ggufs,
    manifests,
    special_files,
    links,
    odd_names,
    runs,
)


def all_attacks() -> list[Attack]:
    """Every attack, kind by kind."""
    return [attack for module in MODULES for attack in module.attacks()]
