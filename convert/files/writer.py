"""Files of tensors, written in place: headers first (the plan knows every shape), then tensors as they come.

Of every format that qtool writes: a `Layout` says where each tensor lies. A journal line follows each fsynced step, so
that a killed run continues after the last one and ends with the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.durable import naming, say
from qtool.convert.files.growing import GrowingDigests, Stretch
from qtool.convert.files.journal import StepJournal, journal_key, resume_journal, start_journal

Spec = tuple[torch.dtype, tuple[int, ...]]
FINAL = "final"  # of a step: the stretches of the files that it wrote


@dataclass(frozen=True)
class Place:
    """A tensor's bytes begin at ``offset`` of ``file``."""

    file: str
    offset: int
    spec: Spec


@dataclass(frozen=True)
class Layout:
    """headers, sizes: file -> what stands before its first tensor, and all its bytes; places: tensor -> its place;
    journal: the journal's name; closing: file -> text, written when all tensors are."""

    headers: Mapping[str, bytes]
    sizes: dict[str, int]
    places: Mapping[str, Place]
    journal: str
    closing: Mapping[str, str] = field(default_factory=dict)


class TensorWriter:
    """Writes the tensors of ``layout`` into ``folder``; steps already in the journal are kept.

    ``key`` identifies the work: a folder with another key's journal, or with other headers, is started over.
    """

    def __init__(self, folder: Path, layout: Layout, key: str) -> None:
        self.folder = folder
        self.steps: list[dict[str, Any]] = []
        self.journal_path = folder / layout.journal
        self._layout = layout
        self._files: dict[str, int] = {}  # descriptors
        self._written: list[Stretch] = []  # since the last step
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not self._resume(key):
                self._start(key)
            for name in layout.headers:
                self._files[name] = os.open(folder / name, os.O_RDWR | os.O_CLOEXEC)
        self._journal = StepJournal(self.journal_path)
        offsets: dict[str, list[int]] = {}
        for place in layout.places.values():
            offsets.setdefault(place.file, []).append(place.offset)
        headers = {name: len(header) for name, header in layout.headers.items()}
        self._digests = GrowingDigests(folder, headers, layout.sizes, offsets)
        self._digests.add(_stretches(self.steps, layout.sizes))
        self.steps = [{key: value for key, value in step.items() if key != FINAL} for step in self.steps]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor at its place; several threads may, readers of the file see it then. Raises ValueError when it
        is not what the plan says."""
        place = self._layout.places[name]
        dtype, shape = place.spec
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: planned {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
        rest = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        self._written.append(self._digests.stretch(place.file, place.offset, len(rest)))
        at = place.offset
        with naming(self.folder / place.file):
            while len(rest):
                count = os.pwrite(self._files[place.file], rest, at)
                rest, at = rest[count:], at + count

    def commit(self, step: dict[str, Any]) -> None:
        """Make everything written so far durable, then note the step in the journal. Raises QtoolError (exit 3)."""
        written, self._written = self._written, []
        for name in {stretch[0] for stretch in written}:
            with naming(self.folder / name):
                os.fsync(self._files[name])
        self._journal.add(step | {FINAL: written})
        self.steps.append(step)
        self._digests.add(written)
        self._digests.follow()

    def close(self) -> None:
        """Close the files and write what the layout wants beside them; their digests are made by a thread. May be
        called again."""
        if not self._files:
            return
        self._close_files()
        self._journal.close()
        for name, text in self._layout.closing.items():
            with naming(self.folder / name):
                (self.folder / name).write_text(text, encoding="utf-8")
        self._digests.finish()

    def wait(self) -> None:
        """Until the digests of the closed files are known."""
        self._digests.wait()

    def release(self) -> None:
        """Close what is open, finished or not; what cannot be written any more was not noted as done."""
        self._digests.stop()
        for close in (self._close_files, self._journal.close):
            with suppress(OSError):
                close()

    def _close_files(self) -> None:
        for name in list(self._files):
            os.close(self._files.pop(name))

    def _resume(self, key: str) -> bool:
        """True when the folder holds this very work, begun; loads its finished steps."""
        steps = resume_journal(self.journal_path, key)
        if steps is None:
            return False
        for name, header in self._layout.headers.items():
            path = self.folder / name
            if not path.exists() or path.stat().st_size != self._layout.sizes[name]:
                return False
            with path.open("rb") as file:
                if file.read(len(header)) != header:
                    return False
        self.steps = steps
        return True

    def _start(self, key: str) -> None:
        """The journal goes first: killed here, no old step must speak of a new, empty file."""
        if self.journal_path.exists() and journal_key(self.journal_path) is None:
            say(f"{self.journal_path}: damaged; its layers are made again.")
        self.journal_path.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_file():
                path.unlink()
        try:
            for name, header in self._layout.headers.items():
                with (self.folder / name).open("wb") as file:
                    file.write(header)
                    os.posix_fallocate(file.fileno(), 0, self._layout.sizes[name])  # a full disk shows now
        except OSError as error:
            raise QtoolError(
                f"{self.folder}: cannot reserve {sum(self._layout.sizes.values()) / 1e9:.2f} GB: {error.strerror}. "
                "Free some space, or set `output_dir:` to another disk.",
                exit_code=3,
            ) from error
        start_journal(self.journal_path, key)


def _stretches(steps: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> Iterator[Stretch]:
    """What the finished steps have written, as far as they say it."""
    for step in steps:
        for stretch in step.get(FINAL, ()):
            match stretch:
                case [str(file), int(begin), int(end)] if file in sizes and 0 <= begin < end <= sizes[file]:
                    yield file, begin, end


def nbytes(spec: Spec) -> int:
    """Bytes of one tensor."""
    dtype, shape = spec
    n = dtype.itemsize
    for size in shape:
        n *= size
    return n
