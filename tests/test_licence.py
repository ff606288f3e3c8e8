"""Licences as model folders state them; their README.md is anybody's text."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qtool.convert.files.licence import card_metadata, read_licence


def test_the_card_speaks_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("  MIT   License\n\nCopyright (c) someone\n")
    assert read_licence(tmp_path) == {"license": "mit"}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags: [a]\n---\n# Model\n")
    assert read_licence(tmp_path) == {"license": "other", "license_name": "mine"}


def test_a_folder_of_licences_is_no_licence_file(tmp_path: Path) -> None:
    (tmp_path / "LICENSES").mkdir()
    assert read_licence(tmp_path) == {}


@pytest.mark.parametrize("yaml", ["date: 2024-13-45", "a: " + "[" * 20_000, "a: [", "- a", "\tb"])
def test_a_broken_card_says_nothing(yaml: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{yaml}\n---\n")
    assert card_metadata(tmp_path) == {}


def test_a_card_of_empty_lines_takes_no_time(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n" + "\n" * 300_000)
    start = time.monotonic()
    assert card_metadata(tmp_path) == {}
    assert time.monotonic() - start < 20  # it was minutes
