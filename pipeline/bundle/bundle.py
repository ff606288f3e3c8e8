"""`qtool bundle`: write the files that suit an artifact's engine, and say what each is and that it was not run."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import wrap

from qtool import QtoolError
from qtool.bundle.table import FILES, NOT_RUN, File
from qtool.bundle.target import Target
from qtool.convert.artifact import Artifact
from qtool.convert.files.reading import shown
from qtool.sizing.serving import PlannedServer

README = "README.md"
SIGNATURE, LOOKED_AT = "Written by qtool ", 400  # of a file that this module wrote, in its first characters


@dataclass(frozen=True)
class Bundle:
    """``files``: name -> text; ``left_out``: sentences on those that are not among them."""

    target: Target
    files: dict[str, str]
    left_out: tuple[str, ...]


def make_bundle(path: Path, server: PlannedServer, repository: str | None, out: Path) -> Bundle:
    """``server``: the artifact in ``path`` as planned; ``out``: where the files will lie. Raises QtoolError where it is
    none, or where its engine has no such files."""
    artifact = Artifact.open(path)
    up = os.path.relpath(path.resolve(), out.resolve())
    for name in (server.headers.name, up, artifact.gguf.name if artifact.gguf else ""):
        if not name.isprintable():
            raise QtoolError(f"{shown(name)}: rename it; a name with unprintable characters goes into no file.")
    if repository is not None and (repository.count("/") != 1 or not all(repository.split("/"))):
        raise QtoolError(f"--repo {repository}: a Hub id is ORG/NAME.")
    if lacks := server.facts.needs_beside(artifact.config):
        raise QtoolError(f"{path}: {server.facts.image} does not run it: {lacks}. `qtool serve` does, where that is.")
    manifest = artifact.manifest
    size = manifest.file_bytes if manifest else sum(f.stat().st_size for f in path.iterdir() if f.is_file())
    target = Target(artifact, server, up, repository, size, manifest.key if manifest else "")
    files, left_out = {}, []
    for kind in server.facts.bundle:
        file = FILES[kind]
        if file.published and repository is None:
            left_out.append(f"{file.name}: names the artifact on the Hub; give --repo ORG/NAME")
            continue
        if file.nvidia and not server.setting.card.cuda:
            left_out.append(f"{file.name}: is for NVIDIA's cards, as {server.facts.image} is; name one with --card")
            continue
        try:
            files[file.name] = written(target, file)
        except QtoolError as error:
            left_out.append(f"{file.name}: {error.message}")
    if not files:
        raise QtoolError(f"{path}: {server.facts.name} has no files of its own kind. {' '.join(left_out)}".rstrip())
    files[README] = _readme(target, files, left_out)
    return Bundle(target, files, tuple(left_out))


def written(target: Target, file: File) -> str:
    """Header and text."""
    note = header(target, file)
    wrapped = [part for line in note for part in wrap(line, 112, break_long_words=False, break_on_hyphens=False)]
    lines = "".join(f"{file.comment}{line}\n" for line in wrapped) if file.comment else ""
    return f"{file.first}{lines}{file.text(target, ' '.join(note))}"


def header(target: Target, file: File) -> list[str]:
    """Where it comes from, how to use it, that nobody ran it."""
    key = f" (key {target.key[:12]})" if target.key else ""
    return [
        f"{SIGNATURE}{version('qtool-llm')} from {target.name}{key} and its plan for {target.planned}.",
        f"Use: {file.use}.",
        f"{NOT_RUN} {_checked(file)}",
    ]


def _checked(file: File) -> str:
    if not file.checked:
        return "Nothing checked a file of this kind."
    return f"A file of this kind was checked with {file.checked} (docs/observing.md of qtool)."


def write_bundle(bundle: Bundle, out: Path) -> list[Path]:
    """An earlier bundle's files are replaced, and those that this one leaves out go: their plan was another. Raises
    QtoolError for a folder that cannot be written, and for a link or somebody else's file where one would be put."""
    try:
        if out.is_symlink():
            raise QtoolError(f"{shown(out)}: is a link; name the folder itself with --out.")
        out.mkdir(parents=True, exist_ok=True)
        foreign = [name for name in bundle.files if os.path.lexists(out / name) and not _ours(out / name)]
        if foreign:
            raise QtoolError(
                f"{shown(out / foreign[0])}: is none of qtool's files; move it away, or take another --out."
            )
        for stale in (out / file.name for file in FILES.values() if file.name not in bundle.files):
            if _ours(stale):
                stale.unlink()
        for name, text in bundle.files.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise QtoolError(f"{shown(out)}: cannot be written ({error.strerror}).", exit_code=3) from error
    return [out / name for name in bundle.files]


def _ours(file: Path) -> bool:
    """Whether this module wrote it."""
    if file.is_symlink() or not file.is_file():
        return False
    return SIGNATURE in file.read_text(encoding="utf-8", errors="replace")[:LOOKED_AT]


def _readme(target: Target, files: dict[str, str], left_out: list[str]) -> str:
    known = {file.name: file for file in FILES.values()}
    rows = [f"| `{name}` | {known[name].use} | {known[name].checked or 'nothing'} |" for name in files]
    missing = ["", "Left out:", *(f"- {text}" for text in left_out)] if left_out else []
    watch = f"qtool watch http://HOST:8000 --artifact {shlex.quote(target.up)} --card {target.server.setting.card.key}"
    return "\n".join([
        f"# {target.name}, served", "", f"{SIGNATURE}{version('qtool-llm')}. Planned: {target.planned}. {NOT_RUN}", "",
        "| file | use | its kind was checked with |", "|---|---|---|", *rows, "",
        f"Watch it: `{watch}`", *missing, "",
    ])  # fmt: skip
