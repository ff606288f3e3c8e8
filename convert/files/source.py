"""Where a model comes from: a local folder, or a Hub id at a revision, resolved to a local snapshot and a commit."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.reading import hub_cache, named, shown
from qtool.convert.files.watch import Watched, digests, known_file, require_unchanged, watch_blob, watch_later

# Everything but other frameworks' weights: tokenizer files are carried into the artifacts byte for byte.
HUB_PATTERNS = [
    "*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "README.md",
]  # fmt: skip
# What the model is, and its tokens.
DECIDING = {".safetensors", ".gguf", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}
NAME_BYTES = 120  # a file's name ends at 255 bytes, and an output's name follows
BESIDE = 8  # names in an error at most
_UNFIT = r"[\s/\\:*?\"<>|'`$&;!()\[\]{}#%]+"  # for a shell, or for another system's files
SHIPPED = {"qtool-demo": ("qtool", "data/demo-model")}  # name -> package and folder
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
RETRIES = "huggingface_hub.utils._http"  # the logger that tells of each


@dataclass(frozen=True)
class ModelSource:
    """A model as files on this machine. ``revision``: the Hub's commit, empty for a local folder; ``files``: those that
    decide what it is, as they were when it was found."""

    name: str
    path: Path
    revision: str = ""
    files: tuple[Watched, ...] = field(default=(), compare=False, repr=False)

    @property
    def commit(self) -> str:
        """The Hub commit, or ``sha256:…`` over a local folder's files, which are read for it once. Raises QtoolError
        where one has changed since the model was found, or cannot be read."""
        return self.revision or "sha256:" + _digest_of(self.files)

    def read_behind(self) -> None:
        """Begin to read the files for `commit` in threads, while the caller does something else."""
        if not self.revision:
            threading.Thread(target=self._read, name="source", daemon=True).start()

    def _read(self) -> None:
        with suppress(QtoolError):  # raised again where the commit is asked for
            _ = self.commit

    def require_unchanged(self) -> None:
        """Raises QtoolError naming a file that changed, came or went since the model was found."""
        require_unchanged(self.files)
        known = {file.path for file in self.files}
        if new := [path for path in deciding_files(self.path) if path not in known and self.files]:
            raise QtoolError(f"{new[0]}: was put there while the model was being converted. Remove it, or run again.")

    def told(self) -> list[Any]:
        """As JSON holds it: for another process on this machine, which need not read the files. Raises as `commit`."""
        _ = self.commit
        files = [[str(file.path), file.stamp, file.digest] for file in self.files]
        return [self.name, str(self.path), self.revision, files]

    @classmethod
    def heard(cls, told: list[Any]) -> ModelSource:
        """Inverse of `told`."""
        name, path, revision, files = told
        known = [known_file(Path(file), tuple(stamp), digest, bool(revision)) for file, stamp, digest in files]
        return cls(name, Path(path), revision, tuple(known))


def resolve(model: str, revision: str | None = None) -> ModelSource:
    """Find ``model`` among the shipped ones, on disk or on the Hub (cached copies serve offline).

    Raises QtoolError: exit 2 for a missing folder or an unknown id, exit 3 when the network is missing.
    """
    if model in SHIPPED:
        return _local(model, shipped(model))
    path = named(model)
    if os.path.isdir(path):  # False for a name that no file can have
        path = Path(os.path.realpath(path))
        return _local(name_of(path), path)
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise QtoolError(f"model: no folder {shown(model)!r}, and it is not a Hub id (org/name). Check the path.")
    return _snapshot(model, revision)


def shipped(model: str) -> Path:
    """The folder of a model that ships with qtool: where its files really lie, which an editable install only links."""
    package, folder = SHIPPED[model]
    return Path(os.path.realpath(str(files(package).joinpath(folder, "config.json")))).parent


def _local(name: str, path: Path) -> ModelSource:
    return ModelSource(name, path, files=tuple(watch_later(file) for file in deciding_files(path)))


def name_of(folder: Path) -> str:
    """What artifacts of the model in ``folder`` are called, whatever path or link leads there: the folder's own name,
    the repository's for a snapshot in the Hub's cache. No blanks, and no dash or dot in front: the name stands in
    commands and in files."""
    home = Path(os.path.realpath(folder))
    cache = hub_cache(home)
    name = home.name
    if cache is not None:
        inner = home.relative_to(cache / "snapshots").parts[1:]
        name = "-".join((cache.name.split("--")[-1], *inner))
    name = "".join(c if c.isprintable() else " " for c in name)
    name = re.sub(_UNFIT, "-", name).strip("-.")
    while len(name.encode()) > NAME_BYTES:
        name = name[:-1]
    return name or "model"


def _snapshot(model: str, revision: str | None) -> ModelSource:
    from huggingface_hub import snapshot_download

    offline = "Download it elsewhere with `hf download`, copy the folder here and name the folder as `model:`."
    with asking_the_hub(model, revision, offline):
        path = Path(snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS))
    seen = tuple(watch_blob(file) for file in deciding_files(path))
    return ModelSource(model.split("/")[-1], path, path.name, seen)  # a snapshot folder is named by its commit


@contextmanager
def asking_the_hub(model: str, revision: str | None, offline: str) -> Iterator[None]:
    """huggingface_hub's errors as QtoolErrors, and of its retries no word. ``offline``: what to do where the Hub cannot
    be reached (exit 3)."""
    from huggingface_hub import errors

    retries = logging.getLogger(RETRIES)
    before = retries.level
    retries.setLevel(logging.ERROR)  # twelve lines that end in one error say no more than the error
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise QtoolError(f"{model}: has no revision {revision!r} on the Hub.") from error
    except errors.GatedRepoError as error:
        raise QtoolError(
            f"{model}: is gated: accept its terms on its page at the Hub, then log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise QtoolError(
            f"{model}: is not on the Hub, or is private: log in with `hf auth login`.{beside(model)}"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise QtoolError(f"{model}: has no config.json on the Hub, so its shape is unknown.") from error
    except errors.HFValidationError as error:
        raise QtoolError(f"{model}: is no id that the Hub allows.") from error
    except errors.SafetensorsParsingError as error:
        raise QtoolError(f"{model}: holds a file that is not whole safetensors ({error}).") from error
    except OSError as error:  # the one for "neither in the cache nor reachable" among them
        raise QtoolError(
            f"{model}: is not in the local cache and the Hub cannot be reached ({type(error).__name__})."
            f"{beside(model)} {offline}",
            exit_code=3,
        ) from error
    finally:
        retries.setLevel(before)


def beside(model: str) -> str:
    """A sentence for a Hub id that may be a mistyped path: what the folder of its first part holds. Empty where there
    is no such folder."""
    first = model.split("/")[0]
    if "/" not in model or not os.path.isdir(first):
        return ""
    names = sorted(entry.name for entry in os.scandir(first) if entry.is_dir() and not entry.name.startswith("."))
    held = ", ".join(map(shown, names[:BESIDE])) + (", …" if len(names) > BESIDE else "")
    return f" Nor is it a folder here: {first} holds {held or 'no folder'}."


def deciding_files(folder: Path) -> list[Path]:
    """The files of a model's folder that decide what it is, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in DECIDING and path.is_file())


def digest_folder(folder: Path) -> str:
    """sha256 over names and contents of the files that decide what the model is."""
    return _digest_of([watch_later(file) for file in deciding_files(folder)])


def _digest_of(files: Sequence[Watched]) -> str:
    digest = hashlib.sha256()
    for file, found in zip(files, digests(files), strict=True):
        digest.update(file.path.name.encode() + b"\0" + str(found).encode())
    return digest.hexdigest()
