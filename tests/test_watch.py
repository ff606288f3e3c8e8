"""Digests of files: what this process has read is not read again, and what changed is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from qtool import QtoolError
from qtool.convert.files import watch
from qtool.convert.files.watch import sha256_file, sha256_files, watch_all


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was written long enough ago."""
    monkeypatch.setattr(watch, "SETTLED", 0)
    path = tmp_path / "a.bin"
    path.write_bytes(b"one" * 1000)
    return path


def plain(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_change_of_the_same_size_is_seen(settled: Path) -> None:
    before = sha256_file(settled)
    times = settled.stat()
    settled.write_bytes(b"two" * 1000)
    os.utime(settled, ns=(times.st_atime_ns, times.st_mtime_ns))  # set back; ctime is not
    assert sha256_file(settled) == plain(settled) != before


def test_a_file_that_was_written_just_now_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SETTLED", 10**18)
    monkeypatch.setattr(watch, "_known", known := {})
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    assert sha256_file(path) == plain(path)
    assert not known


def test_a_remembered_digest_is_used(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = settled.stat()
    stamp = (found.st_dev, (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino))
    monkeypatch.setattr(watch, "_known", {stamp: "planted"})
    assert sha256_file(settled) == "planted"


def test_many_side_by_side_keep_their_order_and_name_a_fault(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.bin" for number in range(30)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 5000 * (30 - number))
    assert sha256_files(paths) == [plain(path) for path in paths]
    assert [(w.path, w.digest) for w in watch_all(paths)] == [(path, plain(path)) for path in paths]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(QtoolError, match="pipe"):
        sha256_files([*paths, tmp_path / "pipe"])
