"""The folder of an artifact: the names in it, what the source lends it, and how it is told from an unfinished one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import QtoolError
from qtool.convert.files.config_file import read_config
from qtool.convert.files.durable import naming
from qtool.convert.files.manifest import MANIFEST, FileEntry, read_manifest
from qtool.convert.files.sidecars import carried_bytes, sidecars, without_private_paths
from qtool.convert.files.small_floats import without_small_floats
from qtool.convert.files.source import digest_folder
from qtool.convert.files.watch import sha256_files

if TYPE_CHECKING:
    import torch

EXTRAS = "qtool"  # subfolder no loader looks into: fold scales
FOLD_SCALES = "fold_scales"
PARTIAL = ".partial"


def key_of(folder: Path) -> str:
    """Which artifact this is: its manifest's key, or of another tool's folder a digest of what is in it. Raises
    QtoolError for an unfinished folder."""
    refuse_unfinished(folder)
    return read_manifest(folder).key if (folder / MANIFEST).exists() else f"unsigned:{digest_folder(folder)}"


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


def made_config(
    source: Path, quantization: Mapping[str, Any], dtype: torch.dtype | None, more: Mapping[str, Any]
) -> dict[str, Any]:
    """The source's own config.json, private paths reduced, plus ``quantization_config``, if any, and ``more`` keys that
    it does not have. ``dtype`` and
    ``torch_dtype`` both say how the tensors are stored (None: what the source says): transformers 4 reads the second;
    vLLM and transformers 5 follow the first where both stand.

    Never re-serialized through transformers: version 5 writes keys that 4.x readers misread.
    """
    config: dict[str, Any] = without_private_paths(without_small_floats(read_config(source)))
    said = config.get("dtype") or config.get("torch_dtype") if dtype is None else str(dtype).removeprefix("torch.")
    if said:
        config |= {"dtype": said, "torch_dtype": said}
    config = {**more, **config}
    if quantization:
        config["quantization_config"] = dict(quantization)
    return config


def write_config(
    source: Path,
    target: Path,
    quantization: Mapping[str, Any],
    dtype: torch.dtype | None,
    more: Mapping[str, Any],
    copies: Sequence[str] = (),
) -> None:
    """`made_config` as config.json; ``copies``: files that hold ``quantization`` alone."""
    write_json(target / "config.json", made_config(source, quantization, dtype, more))
    for name in copies:
        write_json(target / name, dict(quantization))


def write_json(path: Path, data: Any) -> None:
    """Two-space JSON with a final newline."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Every file but the manifest and journals -> size and sha256; names relative to the folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    files = {n: path for n, path in named.items() if n != MANIFEST and not n.endswith("journal.jsonl")}
    digests = sha256_files(files.values())
    return {
        name: FileEntry(bytes=path.stat().st_size, sha256=digest)
        for (name, path), digest in zip(files.items(), digests, strict=True)
    }


def drop_journals(folder: Path) -> None:
    """What a finished artifact needs no more. Raises QtoolError (exit 3)."""
    with naming(folder):
        for journal in folder.rglob("*journal.jsonl"):
            journal.unlink(missing_ok=True)
