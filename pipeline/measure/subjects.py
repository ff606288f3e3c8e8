"""The models to judge: the source, artifacts, or a model that a server has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint, TensorStream
from qtool.convert.files.folder import key_of
from qtool.convert.formats.reader import Folder


@dataclass(frozen=True)
class Subject:
    """One model: the source (``key`` its commit) or an artifact (``key`` its manifest's). ``path``: the folder that an
    engine with kernels of its own loads; ``gguf``: the file that llama.cpp does. A served model has only its name."""

    name: str
    key: str
    stream: Callable[[str], TensorStream] | None = None
    gguf: Path | None = None
    path: Path | None = None


def source_subject(checkpoint: Checkpoint, commit: str) -> Subject:
    """The unquantized model."""
    return Subject("source", commit, Folder(checkpoint, {}).read, path=checkpoint.path)


def artifact_subject(name: str, artifact: Artifact) -> Subject:
    """A finished artifact, or another tool's folder, which is known by what is in it."""
    return Subject(name, key_of(artifact.path), artifact.read, artifact.gguf, artifact.path)
