"""Digests of files: what this process has read is not read again, and what changed is."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from qtool import QtoolError
from qtool.convert.files import watch
from qtool.convert.files.source import digest_folder, resolve
from qtool.convert.files.watch import digests, sha256_file, sha256_files, watch_later


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
    assert digests([watch_later(path) for path in paths]) == [plain(path) for path in paths]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(QtoolError, match="pipe"):
        sha256_files([*paths, tmp_path / "pipe"])


def test_a_source_is_read_behind_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller goes on meanwhile; who asks for the commit waits, and gets what reading at once gives."""
    for number in range(5):
        (tmp_path / f"{number}.safetensors").write_bytes(bytes([number]) * 1000)
    expected = resolve(str(tmp_path)).commit
    assert expected == "sha256:" + digest_folder(tmp_path)
    go, read = threading.Event(), []

    def slow(path: Path) -> str:
        read.append(path.name)
        assert go.wait(5)
        return plain(path)

    monkeypatch.setattr(watch, "sha256_file", slow)
    source = resolve(str(tmp_path))
    assert not read  # nobody has asked
    source.read_behind()
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(source.commit))
    asking.start()
    time.sleep(0.05)
    assert not found
    go.set()
    asking.join(5)
    assert found == [expected] == [source.commit]
    assert sorted(read) == [f"{number}.safetensors" for number in range(5)]


def test_a_source_that_changes_before_it_is_read_is_refused(tmp_path: Path) -> None:
    """Its headers were read when it was found: they and the digest would be of two files."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"one")
    source = resolve(str(tmp_path))
    path.write_bytes(b"two")
    source.read_behind()  # in silence
    for _ in range(2):
        with pytest.raises(QtoolError, match=r"a.safetensors: changed while the model was being read"):
            _ = source.commit
    with pytest.raises(QtoolError, match=r"a.safetensors: changed while"):
        source.require_unchanged()
    path.unlink()
    with pytest.raises(QtoolError, match=r"a.safetensors: no such file"):
        _ = source.commit


def test_a_planned_recipe_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtool.preparing import prepare

    read: list[Path] = []
    monkeypatch.setattr(watch, "sha256_file", read.append)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: qtool-demo\noutputs: [{method: nf4}]\n")
    prepare(recipe, "cpu")
    assert not read
