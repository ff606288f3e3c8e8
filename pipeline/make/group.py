"""What torchrun, or `qtool run --gpus`, tells a process of the group that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping

# Engines that are started later must not take it for theirs.
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def seated(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several; others' jobs set some of these variables, too."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= environment.keys()
