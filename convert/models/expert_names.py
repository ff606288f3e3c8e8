"""Which expert a tensor or a matrix is a part of, by its name: `mlp.experts.7.up_proj.weight`, in every family."""

from __future__ import annotations

import re

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def expert_of(name: str) -> int | None:
    """The expert's number; None for whatever is no part of one."""
    found = _EXPERT.search(name)
    return int(found[1]) if found else None


def stacked(name: str) -> str:
    """The name that all experts have together of a tensor or a matrix of one of them; of others their own."""
    return _EXPERT.sub(".experts.", name)
