"""Files that strangers made: what is no file, too large or in another encoding is said before it is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qtool import QtoolError
from qtool.convert.files.reading import leaves_folder, open_file, read_bytes, read_json, read_text, shown


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfdef f():\n")
    assert read_text(tmp_path / "a.txt") == "def f():\n"


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"caf\xe9", r"not UTF-8 \(byte 3: 0xe9\)"), ("a".encode("utf-16"), "UTF-16")],
)
def test_another_encoding_is_named(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(QtoolError, match=says):
        read_text(tmp_path / "a.txt")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, says in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder"), (Path("/dev/zero"), "a device")):
        with pytest.raises(QtoolError, match=f"is {says}, not a file"):
            open_file(path)


def test_a_size_is_asked_before_reading(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(3_000_000)
    with pytest.raises(QtoolError, match="has 3 MB; qtool reads at most 2 MB"):
        read_bytes(tmp_path / "large", 2_000_000)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match=r"too long|null"):
        open_file(tmp_path / name)
    assert len(shown(name)) < 200


def test_json_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(QtoolError, match="expected a JSON object"):
        read_json(tmp_path / "a.json")


def test_links_that_leave_a_folder(tmp_path: Path) -> None:
    """The Hub's cache links a snapshot's files to its blobs; nothing else may leave."""
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (tmp_path / "secret").write_text("mine")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret")
    (snapshot / "own.txt").symlink_to("config.json")
    assert [leaves_folder(snapshot, snapshot / name) for name in ("config.json", "notes.txt", "own.txt")] == [
        False, True, False,
    ]  # fmt: skip
