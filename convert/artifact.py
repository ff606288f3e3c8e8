"""A finished artifact: a folder that loaders understand, plus `qtool.json`, the manifest that says what it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint, TensorStream
from qtool.convert.files.config_file import read_config
from qtool.convert.files.durable import make_durable, naming
from qtool.convert.files.folder import drop_journals, refuse_unfinished, write_json
from qtool.convert.files.manifest import MANIFEST, Manifest, read_manifest
from qtool.convert.formats.codes import Codes
from qtool.convert.formats.gguf.file import GgufFile
from qtool.convert.formats.gguf.imatrix import IMATRIX
from qtool.convert.formats.linears import Linears
from qtool.convert.formats.reader import Folder, Reader
from qtool.convert.models.fused import open_model


class Artifact:
    """An artifact on disk. A folder made by another tool opens too (``manifest`` is None then)."""

    def __init__(
        self, path: Path, config: dict[str, Any], manifest: Manifest | None, weights: Checkpoint | Path
    ) -> None:
        self.path = path
        self.config = config
        self.manifest = manifest
        self._weights = weights

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Raises QtoolError when the folder is unfinished, is no model, or its manifest is not qtool's."""
        refuse_unfinished(path)
        manifest = read_manifest(path) if (path / MANIFEST).exists() else None
        config = read_config(path)
        files = [file for file in sorted(path.glob("*.gguf")) if file.name != IMATRIX]
        return cls(path, config, manifest, files[0] if files else open_model(path))

    @property
    def checkpoint(self) -> Checkpoint:
        """The safetensors shards. Raises QtoolError for a .gguf artifact, which has none."""
        if isinstance(self._weights, Path):
            raise QtoolError(f"{self.path}: holds {self._weights.name}, no safetensors.")
        return self._weights

    @cached_property
    def file(self) -> GgufFile:
        """The .gguf file, opened here, because reading its vocabulary takes seconds. Raises QtoolError for an artifact
        that has none, and for a file that is no whole GGUF file."""
        if not isinstance(self._weights, Path):
            raise QtoolError(f"{self.path}: holds safetensors, no .gguf file.")
        return GgufFile.open(self._weights, self.config)

    @property
    def weights(self) -> Reader:
        """Where the tensors are, whatever the format. Raises QtoolError for a file that is no whole GGUF file."""
        return Folder(self._weights, self.quantization) if isinstance(self._weights, Checkpoint) else self.file

    @property
    def notes(self) -> list[str]:
        """What the maker of the artifact had to say: fallback types, proofs made and not made."""
        return self.manifest.notes if self.manifest else []

    @property
    def gguf(self) -> Path | None:
        """The .gguf file, where the artifact is one."""
        return self._weights if isinstance(self._weights, Path) else None

    @property
    def quantization(self) -> dict[str, Any]:
        """``quantization_config``; empty for an unquantized model and for a .gguf file, which says it itself."""
        section: dict[str, Any] = self.config.get("quantization_config") or {}
        return section

    @property
    def packed(self) -> Linears:
        """The quantized linears. Raises QtoolError for a container that qtool does not read."""
        return Linears(self.checkpoint, self.quantization)

    def linears(self) -> list[str]:
        """Names of the quantized linears, in file order."""
        return self.weights.linears()

    def codes(self, linear: str) -> Codes:
        """One linear as codes and scales."""
        return self.weights.codes(linear)

    def read(self, prefix: str = "") -> TensorStream:
        """Every tensor of the model under its Hugging Face name, where that begins with ``prefix``; quantized linears
        dequantized to float32."""
        return self.weights.read(prefix)


def seal(partial: Path, final: Path, manifest: Manifest, look_again: Callable[[], None] = lambda: None) -> Artifact:
    """Write the manifest and give the folder its name: from here on it exists, power cuts or not. The journals go
    last, so that whatever ends this process before, no finished layer is lost. ``look_again`` raises QtoolError where
    what the artifact was made from is no longer what its key says. Raises QtoolError where something is in the way."""
    write_json(partial / MANIFEST, manifest.model_dump())
    with naming(partial):
        for path in (*partial.rglob("*"), partial):
            make_durable(path)
    look_again()
    with naming(final):
        partial.rename(final)
        make_durable(final.parent)
    drop_journals(final)
    return Artifact.open(final)
