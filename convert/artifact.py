"""A finished artifact: a folder that loaders understand, plus `qtool.json`, the manifest that says what it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from qtool import QtoolError
from qtool.convert.checkpoint import Checkpoint, TensorStream
from qtool.convert.codes import Codes
from qtool.convert.containers import Linears
from qtool.convert.gguf_file import GgufFile
from qtool.convert.reading import read_json
from qtool.convert.source import sha256_file

MANIFEST = "qtool.json"
EXTRAS = "qtool"  # subfolder no loader looks into: fold scales
FOLD_SCALES = "fold_scales"
IMATRIX = "imatrix.gguf"
PARTIAL = ".partial"
# Carried byte for byte. config.json is edited, not carried; weights, their indices and the source's card stay behind.
SIDECARS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
QUANTIZE_CONFIG = "quantize_config.json"
_NOT_SIDECARS = {"config.json", MANIFEST, QUANTIZE_CONFIG}


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What is in the folder, how it was made, and what each linear lost."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    qtool: str
    key: str
    output: dict[str, Any]
    source: dict[str, Any]
    calibration: dict[str, Any]
    device: str
    versions: dict[str, str]
    parameters: int
    tensor_bytes: int
    bits_per_weight: float
    ledger: dict[str, dict[str, float]]
    files: dict[str, FileEntry]
    notes: list[str] = []

    @property
    def file_bytes(self) -> int:
        """Size of the whole folder, without the manifest itself."""
        return sum(entry.bytes for entry in self.files.values())


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
        if not path.is_dir():
            raise QtoolError(f"{path}: no such folder.")
        if path.name.endswith(PARTIAL):
            raise QtoolError(f"{path}: an unfinished artifact. Run its recipe again; it continues where it stopped.")
        manifest = read_manifest(path) if (path / MANIFEST).exists() else None
        config = read_json(path / "config.json")
        if not isinstance(config.get("quantization_config") or {}, dict):
            raise QtoolError(f"{path / 'config.json'}: quantization_config is no mapping.")
        files = [file for file in sorted(path.glob("*.gguf")) if file.name != IMATRIX]
        return cls(path, config, manifest, files[0] if files else Checkpoint.open(path))

    @property
    def checkpoint(self) -> Checkpoint:
        """The safetensors shards. Raises QtoolError for a .gguf artifact, which has none."""
        if isinstance(self._weights, Path):
            raise QtoolError(f"{self.path}: holds {self._weights.name}, no safetensors.")
        return self._weights

    @cached_property
    def weights(self) -> Checkpoint | GgufFile:
        """Where the tensors are; a .gguf file is opened here, because reading its vocabulary takes seconds. Raises
        QtoolError for a file that is no whole GGUF file."""
        return GgufFile.open(self._weights, self.config) if isinstance(self._weights, Path) else self._weights

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
        if isinstance(self.weights, GgufFile):
            return [name.removesuffix(".weight") for name in self.weights.hf_names() if name.endswith("_proj.weight")]
        return self.packed.names() if self.quantization else []

    def codes(self, linear: str) -> Codes:
        """One linear as codes and scales."""
        return self.weights.codes(linear) if isinstance(self.weights, GgufFile) else self.packed.codes(linear)

    def read(self) -> TensorStream:
        """Every tensor of the model under its Hugging Face name; quantized linears dequantized to float32."""
        if isinstance(self.weights, GgufFile) or not self.quantization:
            yield from self.weights.read()
            return
        packed = self.packed
        mark = f".{packed.container.MARK}"
        parts = {f"{linear}.{suffix}" for linear in packed.names() for suffix in packed.parts(linear)}
        for name in self.checkpoint.tensors:
            if name.endswith(mark):
                linear = name.removesuffix(mark)
                yield f"{linear}.weight", packed.codes(linear).dequantize()
            elif name not in parts:
                yield name, self.checkpoint.tensor(name)


def read_manifest(path: Path) -> Manifest:
    """`qtool.json` of a folder. Raises QtoolError naming the file and the first fault, a file outside the folder among
    them."""
    file = path / MANIFEST
    try:
        manifest = Manifest.model_validate(read_json(file))
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise QtoolError(f"{file}: not a manifest this qtool understands ({place}: {fault['msg']}).") from error
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise QtoolError(f"{file}: names a file outside its folder ({name}). Do not trust it.")
    return manifest


def copy_sidecars(source: Path, target: Path, with_code: bool) -> None:
    """Carry tokenizer, generation config, chat template and licence along byte for byte."""
    patterns = (*SIDECARS, "*.py") if with_code else SIDECARS
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file() and path.name not in _NOT_SIDECARS and not path.name.endswith(".index.json"):
                shutil.copyfile(path, target / path.name)


def write_config(source: Path, target: Path, quantization: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    """The source's own config.json plus ``quantization_config``, if any. ``dtype`` and ``torch_dtype`` both say how
    the tensors are stored (None: what the source says): transformers 4 reads the second; vLLM and transformers 5 follow
    the first where both stand. GPTQ's section also becomes quantize_config.json, where AutoGPTQ looks for it.

    Never re-serialized through transformers: version 5 writes keys that 4.x readers misread.
    """
    config = read_json(source / "config.json")
    said = config.get("dtype") or config.get("torch_dtype") if dtype is None else str(dtype).removeprefix("torch.")
    if said:
        config |= {"dtype": said, "torch_dtype": said}
    if quantization:
        config["quantization_config"] = dict(quantization)
    write_json(target / "config.json", config)
    if quantization.get("quant_method") == "gptq":
        write_json(target / QUANTIZE_CONFIG, dict(quantization))


def write_json(path: Path, data: Any) -> None:
    """Two-space JSON with a final newline."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Every file but the manifest and journals -> size and sha256; names relative to the folder."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and not name.endswith("journal.jsonl"):
            entries[name] = FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))
    return entries


def seal(partial: Path, final: Path, manifest: Manifest) -> Artifact:
    """Write the manifest, drop the journals and give the folder its name: from here on it exists, power cuts or not."""
    write_json(partial / MANIFEST, manifest.model_dump())
    for journal in partial.rglob("*journal.jsonl"):
        journal.unlink()
    for path in (*partial.rglob("*"), partial):
        _make_durable(path)
    partial.rename(final)
    _make_durable(final.parent)
    return Artifact.open(final)


def _make_durable(path: Path) -> None:
    """A file's contents, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
