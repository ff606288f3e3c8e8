"""A finished artifact: a folder that loaders understand, plus `qtool.json`, the manifest that says what it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint, TensorStream
from qtool.convert.files.durable import make_durable, naming
from qtool.convert.files.manifest import MANIFEST, FileEntry, Manifest, read_manifest
from qtool.convert.files.sidecars import carried_bytes, sidecars, without_private_paths
from qtool.convert.files.watch import sha256_file
from qtool.convert.formats.codes import Codes
from qtool.convert.formats.containers import Linears
from qtool.convert.formats.gguf.file import GgufFile
from qtool.convert.models.config_file import read_config

EXTRAS = "qtool"  # subfolder no loader looks into: fold scales
FOLD_SCALES = "fold_scales"
IMATRIX = "imatrix.gguf"
PARTIAL = ".partial"
QUANTIZE_CONFIG = "quantize_config.json"


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
            held = self.weights.decoder.held()
            return [module for name in self.weights.hf_names() for module, _ in held.get(name, ())]
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


def refuse_unfinished(path: Path) -> None:
    """Raises QtoolError for what is no folder, or one that still grows."""
    if not path.is_dir():
        raise QtoolError(f"{path}: no such folder.")
    if path.name.endswith(PARTIAL):
        raise QtoolError(f"{path}: an unfinished artifact. Run its recipe again; it continues where it stopped.")


def copy_sidecars(source: Path, target: Path, with_code: bool) -> None:
    """Carry tokenizer, generation config, chat template and licence along, byte for byte but for private paths."""
    for path in sidecars(source, with_code):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(carried_bytes(path))


def made_config(source: Path, quantization: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The source's own config.json, private paths reduced, plus ``quantization_config``, if any. ``dtype`` and
    ``torch_dtype`` both say how the tensors are stored (None: what the source says): transformers 4 reads the second;
    vLLM and transformers 5 follow the first where both stand.

    Never re-serialized through transformers: version 5 writes keys that 4.x readers misread.
    """
    config: dict[str, Any] = without_private_paths(read_config(source))
    said = config.get("dtype") or config.get("torch_dtype") if dtype is None else str(dtype).removeprefix("torch.")
    if said:
        config |= {"dtype": said, "torch_dtype": said}
    if quantization:
        config["quantization_config"] = dict(quantization)
    return config


def write_config(source: Path, target: Path, quantization: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    """`made_config` as config.json. GPTQ's section also becomes quantize_config.json, where AutoGPTQ looks for it."""
    write_json(target / "config.json", made_config(source, quantization, dtype))
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


def drop_journals(folder: Path) -> None:
    """What a finished artifact needs no more. Raises QtoolError (exit 3)."""
    with naming(folder):
        for journal in folder.rglob("*journal.jsonl"):
            journal.unlink(missing_ok=True)
