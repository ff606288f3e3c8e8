"""Checks of an artifact's folder: every file of the manifest as it was written, and nothing beside it that changes what
a loader makes of the model."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from qtool import QtoolError
from qtool.convert.files.manifest import MANIFEST, FileEntry, Manifest
from qtool.convert.files.reading import leaves_folder, open_file, read_json, shown
from qtool.convert.files.shard_header import INDEX, SINGLE
from qtool.convert.files.watch import SIDE_BY_SIDE, sha256_file

BUNDLED = {"serve/dashboard.json", "serve/Modelfile"}  # of `qtool bundle`: no loader of the model reads them
EXTRAS, IMATRIX, PUBLISHED = "qtool", "imatrix.gguf", "qtool-scores.json"
WEIGHTS = {
    ".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".pkl", ".pickle", ".npz",
    ".ot", ".tflite", ".mar",
}  # fmt: skip
# What loaders read, one suffix for all of a kind: a notice or a picture in the folder is nobody's business.
READ_BY_LOADERS = WEIGHTS | {".json", ".jinja", ".model", ".tiktoken", ".py", ".so"}
NAMES_READ = {"merges.txt", "vocab.txt", "Modelfile"}
ADAPTER = ("adapter_config.json", "adapter_model")  # transformers with PEFT loads the adapter's base model instead
JSON_READ = ("config.json", "generation_config.json", "quantize_config.json", INDEX)
UNSEEN = {".git", ".cache"}  # of git and of the Hub's client
MOST_ENTRIES = 100_000
MISSING = "is missing"


def check_files(path: Path, manifest: Manifest) -> tuple[str, list[str], str]:
    """Every file of the manifest is there with its sha256, a regular file of this folder; no weights, code or settings
    besides."""
    faults = unfit(path, manifest)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:  # hashing does not hold Python's lock
        looked = pool.map(lambda item: faults.get(item[0]) or _changed(path, *item), manifest.files.items())
        found = list(looked)
    reasons = [fault for fault in found if fault]
    reasons += [*_strangers(path, manifest), *_foreign(path, manifest)]
    for name in JSON_READ:
        if name in manifest.files and name not in faults:
            try:
                read_json(path / name, strict=True)
            except QtoolError as error:
                reasons.append(error.message.removeprefix(f"{path}{os.sep}"))
    return "files and sha256", reasons, f"{len(manifest.files)} files as written"


def unfit(path: Path, manifest: Manifest) -> dict[str, str]:
    """Name -> what is wrong, for files of the manifest that nobody should open: links out of the folder, pipes,
    devices, folders; and those that are missing."""
    faults = {}
    for name in manifest.files:
        file = path / name
        if leaves_folder(path, file):
            faults[name] = f"{name} is a link out of the folder"
        elif not os.path.lexists(file):
            faults[name] = f"{shown(name)} {MISSING}"
        else:
            try:
                open_file(file).close()
            except QtoolError as error:
                faults[name] = f"{shown(name)}: {error.message.removeprefix(f'{file}: ')}"
    return faults


def _changed(path: Path, name: str, entry: FileEntry) -> str | None:
    size = (path / name).stat().st_size
    if size != entry.bytes:
        return f"{name} has {size} bytes, the manifest says {entry.bytes}"
    if sha256_file(path / name) != entry.sha256:
        return f"{name} has changed (sha256)"
    return None


def _strangers(path: Path, manifest: Manifest) -> Iterator[str]:
    """Files that the manifest does not name and some loader would read."""
    for count, (name, mode) in enumerate(_entries(path)):
        if count == MOST_ENTRIES:
            yield f"over {MOST_ENTRIES} files lie in the folder"
            return
        if name in manifest.files or name in (MANIFEST, PUBLISHED):
            continue
        plain = PurePosixPath(name)
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            yield f"{shown(name)} is not in the manifest, and no file"
        elif (plain.suffix.lower() in READ_BY_LOADERS or plain.name in NAMES_READ) and name not in BUNDLED:
            yield f"{shown(name)} is not in the manifest"
        elif stat.S_ISLNK(mode) and (path / name).is_dir():
            yield f"{shown(name)} is not in the manifest, and a link to a folder"


def _entries(path: Path) -> Iterator[tuple[str, int]]:
    """(name relative to the folder, mode of the entry itself) of everything in it but folders."""
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if name not in UNSEEN)
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*files, *links]):
            file = Path(folder, name)
            try:
                yield file.relative_to(path).as_posix(), file.lstat().st_mode
            except OSError:
                continue  # gone while we looked


def _foreign(path: Path, manifest: Manifest) -> Iterator[str]:
    """Files that no artifact holds, whether the manifest names them or not: an adapter, and weights beside the
    weights, of which one loader takes these and another those."""
    names = [name for name in manifest.files if PurePosixPath(name).suffix.lower() in WEIGHTS]
    for name in (PurePosixPath(name).name for name in manifest.files):
        if name.startswith(ADAPTER):
            yield f"{shown(name)} is an adapter's: transformers with PEFT loads that, not this model"
    inner = [n for n in names if n.startswith(f"{EXTRAS}/") and n.endswith(".safetensors")]
    outer = [n for n in names if n not in inner and not PurePosixPath(n).name.startswith(ADAPTER)]
    files = [n for n in outer if n.endswith(".gguf") and n != IMATRIX and "/" not in n]
    expected = set(files[:1]) | {IMATRIX} if files else _shards(path, manifest)
    for name in sorted(set(outer) - expected):
        yield f"{shown(name)} holds weights besides {', '.join(sorted(expected - {IMATRIX})) or 'none'}"
    if SINGLE in expected and INDEX in manifest.files:
        yield f"{INDEX} lies beside {SINGLE}: some loaders follow the one, some the other"


def _shards(path: Path, manifest: Manifest) -> set[str]:
    """What loaders of safetensors take."""
    if SINGLE in manifest.files or INDEX not in manifest.files:
        return {SINGLE}
    try:
        places = read_json(path / INDEX).get("weight_map")
    except QtoolError:
        return set()  # named by the check of the file
    return {str(shard) for shard in places.values()} if isinstance(places, dict) else set()
