"""Tokenizers of strangers: damaged, hostile, of another model; refused in a user's words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool import QtoolError
from qtool.convert.text.tokenizer import load_tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")


def changed(tmp_path: Path, tiny: Path, file: str, edit: Callable[[Any], Any]) -> Path:
    for name in FILES:
        shutil.copy(tiny / name, tmp_path / name)
    data = json.loads((tmp_path / file).read_text())
    edit(data)
    (tmp_path / file).write_text(json.dumps(data))
    return tmp_path


def grows(times: int) -> Callable[[Any], None]:
    return lambda j: j.update(normalizer={"type": "Replace", "pattern": {"Regex": r"[\s\S]"}, "content": "a" * times})


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        ("tokenizer.json", lambda j: j.update(pre_tokenizer={"type": "FromTheFuture"}), "of a newer release than"),
        ("tokenizer.json", lambda j: j["model"].update(merges=[["a", "b", "c"]]), "of a newer release than"),
        ("tokenizer.json", lambda j: j["model"].update(type="Newest"), "of a newer release than"),
        ("tokenizer.json", lambda j: j["model"]["merges"].append(["zzzz", "qqqq"]), "no usable tokenizer"),
        ("tokenizer.json", lambda j: j.pop("model"), "no usable tokenizer"),
        ("tokenizer.json", grows(500), "tokens of"),
        ("tokenizer.json", grows(10**6), "no usable tokenizer"),
        ("tokenizer_config.json", lambda j: j.update(eos_token=7), "no usable tokenizer"),
        ("config.json", lambda j: j.update(vocab_size=0), "eos_token is token 0.*vocab_size is 0"),
    ],
)
def test_refused(tmp_path: Path, tiny: Path, file: str, edit: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(QtoolError, match=said) as caught:
        load_tokenizer(changed(tmp_path, tiny, file, edit))
    assert caught.value.exit_code == 2
    assert str(tmp_path) in caught.value.message


def test_files_that_are_no_tokenizer(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QtoolError, match=r"no tokenizer: none of tokenizer\.json, tokenizer\.model"):
        load_tokenizer(tmp_path)
    file = changed(tmp_path, tiny, "config.json", lambda j: None) / "tokenizer.json"
    whole = file.read_bytes()
    cut = whole[: whole.rindex(b",")]
    for data, said in ((cut, "cut off or damaged"), (b"\xff\xfe{}", "UTF-16"), (b"", "cut off"), (b"[]", "cut off")):
        file.write_bytes(data)
        with pytest.raises(QtoolError, match=said):
            load_tokenizer(tmp_path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(QtoolError, match="is a pipe"):
        load_tokenizer(tmp_path)
    file.unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\n\njunk")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match=r"tokenizer.model (alone needs the package sentencepiece|is damaged)"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(QtoolError, match="expected a JSON object"):
        load_tokenizer(tmp_path)
