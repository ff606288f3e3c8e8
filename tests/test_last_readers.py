"""Files that commands name beside the model: what is no file is refused before it is read, and said by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qtool import QtoolError
from qtool.convert.text.shapes import row_of
from qtool.recipe.judging import PublishSection
from qtool.recipe.yaml_file import read_yaml
from qtool.runs.baseline import load_baseline
from qtool.sizing.accelerators import load_accelerators


def test_a_baseline_and_cards_are_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in ((tmp_path / "pipe", "is a pipe"), (Path("/dev/zero"), "is a device")):
        with pytest.raises(QtoolError, match=said):
            load_baseline(path)
        with pytest.raises(QtoolError, match=said):
            load_accelerators(path)
    with pytest.raises(QtoolError, match="qtool baseline save"):
        load_baseline(tmp_path / "missing.json")


@pytest.mark.parametrize(("text", "line"), [("a: 1\nb: \x01", 2), ("\0" * 9, 1)])
def test_control_characters_are_no_yaml(text: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(QtoolError, match=rf"r\.yaml:{line}: not valid YAML: a control character"):
        read_yaml(tmp_path / "r.yaml")


def test_messages_that_are_text_are_named() -> None:
    with pytest.raises(QtoolError, match=r"c:1: key 'messages': is text, not messages"):
        row_of({"messages": "hi"}, None, "c:1")


@pytest.mark.parametrize("name", ["../../x/y", "/etc/x", "a b", "a/b/c", ""])
def test_a_repository_is_no_path(name: str) -> None:
    with pytest.raises(ValueError, match="to"):
        PublishSection(to=name)
    assert PublishSection(to="my-org/{model}-{format}").to == "my-org/{model}-{format}"


def test_a_message_shows_no_control_codes() -> None:
    assert QtoolError("a\x1b]0;x\x07b\nc").format_message() == "a\ufffd]0;x\ufffdb\nc"
    assert len(QtoolError("x" * 5000 + ": no such folder.").format_message()) < 200


def test_a_damaged_generation_config_is_no_default(tmp_path: Path) -> None:
    import torch

    from qtool.evaluate.engines.transformers import load_native

    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(QtoolError, match=r"generation_config\.json: not valid JSON"):
        load_native(tmp_path, torch.device("cpu"))
