"""Safetensors shards written in place: headers first (the plan knows every shape), then tensors as they come.

A journal line follows each fsynced step, so that a killed run continues after the last one and ends with the same
bytes. Format: https://github.com/huggingface/safetensors#format (u64 little-endian header length, JSON header, data).
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import DTYPE_NAMES
from qtool.convert.files.durable import naming, say
from qtool.convert.files.shard_header import INDEX

Spec = tuple[torch.dtype, tuple[int, ...]]
MAX_SHARD_BYTES = 5_000_000_000


class ShardWriter:
    """Writes the tensors of ``specs`` (in that order) into ``folder``; steps already in the journal are kept.

    ``key`` identifies the work: a folder with another key's journal is started over.
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, Spec], key: str, stem: str = "model", max_shard: int = MAX_SHARD_BYTES
    ) -> None:
        self.folder = folder
        self.steps: list[dict[str, Any]] = []
        self._layout = _Layout(specs, stem, max_shard)
        self._specs = specs
        self.journal_path = folder / f"{stem}.journal.jsonl"
        self._files: dict[str, BinaryIO] = {}
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not self._resume(key):
                self._start(key)
        self._journal = StepJournal(self.journal_path)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor at its place. Raises ValueError when it is not what the plan says."""
        dtype, shape = self._specs[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: planned {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
        shard, offset = self._layout.places[name]
        file = self._file(shard)
        file.seek(offset)
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        with naming(self.folder / shard):
            file.write(data.data)

    def commit(self, step: dict[str, Any]) -> None:
        """Make everything written so far durable, then note the step in the journal. Raises QtoolError (exit 3)."""
        self.flush()
        for shard, file in self._files.items():
            with naming(self.folder / shard):
                os.fsync(file.fileno())
        self._journal.add(step)
        self.steps.append(step)

    def flush(self) -> None:
        """Let readers of the same files see what was written."""
        for shard, file in self._files.items():
            with naming(self.folder / shard):
                file.flush()

    def close(self) -> None:
        """Close the files and write the index that loaders follow when there are several shards."""
        self.flush()
        for file in self._files.values():
            file.close()
        self._journal.close()
        if len(self._layout.headers) > 1:
            weight_map = {name: shard for name, (shard, _) in self._layout.places.items()}
            index = {"metadata": {"total_size": self._layout.total}, "weight_map": dict(sorted(weight_map.items()))}
            with naming(self.folder / INDEX):
                (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def release(self) -> None:
        """Close what is open, finished or not; what cannot be written any more was not noted as done."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()
        self._journal.close()

    def _file(self, shard: str) -> BinaryIO:
        if shard not in self._files:
            self._files[shard] = (self.folder / shard).open("r+b")
        return self._files[shard]

    def _resume(self, key: str) -> bool:
        """True when the folder holds this very work, begun; loads its finished steps."""
        steps = resume_journal(self.journal_path, key)
        if steps is None:
            return False
        for shard, header in self._layout.headers.items():
            path = self.folder / shard
            if not path.exists() or path.stat().st_size != self._layout.sizes[shard]:
                return False
            with path.open("rb") as file:
                if file.read(len(header)) != header:
                    return False
        self.steps = steps
        return True

    def _start(self, key: str) -> None:
        if self.journal_path.exists() and journal_key(self.journal_path) is None:
            say(f"{self.journal_path}: damaged; its layers are made again.")
        for path in self.folder.iterdir():
            if path.is_file():
                path.unlink()
        try:
            for shard, header in self._layout.headers.items():
                with (self.folder / shard).open("wb") as file:
                    file.write(header)
                    os.posix_fallocate(file.fileno(), 0, self._layout.sizes[shard])  # a full disk shows now
        except OSError as error:
            raise QtoolError(
                f"{self.folder}: cannot reserve {self._layout.total / 1e9:.2f} GB: {error.strerror}. "
                "Free some space, or set `output_dir:` to another disk.",
                exit_code=3,
            ) from error
        start_journal(self.journal_path, key)


class StepJournal:
    """The journal of a file that grows, open at its end: a line for each step, durable before `add` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming(path):
            self._file = path.open("ab", buffering=0)

    def add(self, step: dict[str, Any]) -> None:
        """Raises QtoolError (exit 3); half a line, should it be left, is cut off by `resume_journal`."""
        with naming(self.path):
            data = (json.dumps(step) + "\n").encode()
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def start_journal(path: Path, key: str) -> None:
    """A journal of the work ``key`` without a finished step."""
    with naming(path):
        path.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")


def journal_key(path: Path) -> str | None:
    """The work that a journal belongs to; None where there is no journal that says it."""
    try:
        with path.open("rb") as file:
            key = json.loads(file.readline(1 << 16))["key"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return key if isinstance(key, str) else None


def resume_journal(path: Path, key: str) -> list[dict[str, Any]] | None:
    """The finished steps of the work ``key``; None where there is no journal, or another work's.

    The steps are layers, in order. What follows the last good line is cut off: half a line is a step that was never
    finished; anything else is said, and its layers are made again.
    """
    if journal_key(path) != key:
        return None
    with naming(path):
        lines = path.read_bytes().splitlines(keepends=True)
        steps: list[dict[str, Any]] = []
        end = len(lines[0])
        for line in lines[1:]:
            step = _step(line)
            if step is None or step.get("layer", len(steps)) != len(steps):
                if line.endswith(b"\n"):
                    say(f"{path}: damaged after layer {len(steps)}; the layers behind it are made again.")
                break
            steps.append(step)
            end += len(line)
        os.truncate(path, end)
    return steps


def _step(line: bytes) -> dict[str, Any] | None:
    """A line of the journal; None where it is not whole."""
    try:
        step = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(step, dict) or not isinstance(records := step.get("records", {}), dict):
        return None
    rows = [row for row in records.values() if isinstance(row, dict)]
    numbers = all(isinstance(value, int | float) for row in rows for value in row.values())
    return step if numbers and len(rows) == len(records) else None


class _Layout:
    """Which shard and which byte offset each tensor gets."""

    def __init__(self, specs: Mapping[str, Spec], stem: str, max_shard: int) -> None:
        shards: list[list[str]] = [[]]
        used = 0
        for name, spec in specs.items():
            size = nbytes(spec)
            if shards[-1] and used + size > max_shard:
                shards.append([])
                used = 0
            shards[-1].append(name)
            used += size
        self.places: dict[str, tuple[str, int]] = {}
        self.headers: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        for number, names in enumerate(shards, 1):
            shard = f"{stem}.safetensors"
            if len(shards) > 1:
                shard = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            header, offsets, end = _header(names, specs)
            self.headers[shard] = header
            self.sizes[shard] = len(header) + end
            self.places |= {name: (shard, len(header) + offset) for name, offset in offsets.items()}
        self.total = sum(nbytes(spec) for spec in specs.values())


def _header(names: Iterable[str], specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int], int]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    # larger elements first keeps every tensor aligned to its own size, as safetensors' own writer does
    for name in sorted(names, key=lambda n: (-specs[n][0].itemsize, n)):
        dtype, shape = specs[name]
        offsets[name] = end
        end += nbytes(specs[name])
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body, offsets, end


def file_sizes(specs: Mapping[str, Spec], stem: str = "model", max_shard: int = MAX_SHARD_BYTES) -> dict[str, int]:
    """Shard -> bytes that it will have on the disk, header included."""
    return _Layout(specs, stem, max_shard).sizes


def nbytes(spec: Spec) -> int:
    """Bytes of one tensor."""
    dtype, shape = spec
    n = dtype.itemsize
    for size in shape:
        n *= size
    return n
