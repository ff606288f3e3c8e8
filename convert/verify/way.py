"""The two ways in which an artifact is checked, each a module: by safetensors files, or by a .gguf file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from qtool.convert.artifact import Artifact
from qtool.convert.verify import gguf, shards
from qtool.convert.verify.implied import Implied, Shapes
from qtool.convert.verify.tensors import Check, Result


class Way(Protocol):
    """What the checks ask of a kind of file."""

    FURTHER: tuple[tuple[str, Check], ...]
    """Checks of this kind alone, each under its name."""
    TABLE_TOLERANCE: float
    """How much of it an embedding or a head may have lost."""

    def check_tensors(self, artifact: Artifact, device: torch.device) -> Result:
        """Every tensor is there, finite, of its type, and no matrix of zeros; looked at on ``device``."""

    def expected(self, artifact: Artifact, model: Implied) -> set[str]:
        """Names of the tensors that must be there."""

    def misplaced(self, artifact: Artifact) -> Iterator[str]:
        """Tensors that lie where no reader looks for them."""

    def config_faults(self, artifact: Artifact, model: Implied) -> Iterator[str]:
        """What config.json says that makes a loader read these tensors otherwise."""

    def share(self, artifact: Artifact, shapes: Shapes, model: Implied) -> tuple[list[str], set[str]] | None:
        """(names of what is to be quantized, names that are not); None where nothing was to be."""


def way_of(artifact: Artifact) -> Way:
    """The module that checks the files of ``artifact``."""
    return shards if artifact.gguf is None else gguf
