"""Calibration and evaluation text from every kind of place, and how it becomes windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import QtoolError
from qtool.convert.text import TextSource, load_tokenizer, read_rows, token_windows
from qtool.quantize.calibration import CalibrationSet


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return load_tokenizer(tiny)


def source(path: Path | str, **changes: Any) -> TextSource:
    return TextSource(text=str(path), **({"samples": 4, "length": 32} | changes))


def test_windows_are_full_deterministic_and_joined_by_the_end_token(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i} " * 10}) + "\n" for i in range(30)))
    windows = token_windows(source(path), tokenizer)
    assert windows.shape == (4, 32)
    assert windows.dtype == torch.int64
    assert (windows == tokenizer.eos_token_id).any()
    assert torch.equal(windows, token_windows(source(path), tokenizer))
    assert not torch.equal(windows, token_windows(source(path, seed=1), tokenizer))
    digest = CalibrationSet(windows, "x").digest
    assert digest == CalibrationSet(windows.clone(), "y").digest
    changed = windows.clone()
    changed[0, 0] += 1
    assert digest != CalibrationSet(changed, "x").digest
    assert digest != CalibrationSet(windows.reshape(8, 16), "x").digest


def test_a_tokenizer_with_bos_starts_every_window_with_it(tmp_path: Path, tiny: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tiny)
    tokenizer.bos_token = "<eos>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    path = tmp_path / "rows.txt"
    path.write_text("some text " * 100)
    windows = token_windows(source(path), tokenizer)
    assert (windows[:, 0] == 0).all()


def test_parquet_and_messages(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    messages = [{"role": "user", "content": "add two numbers"}, {"role": "assistant", "content": "a + b"}]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [messages] * 40}), path)
    assert next(read_rows(source(path)))[1] == messages
    assert token_windows(source(path), tokenizer).shape == (4, 32)


def test_messages_go_through_the_chat_template(tmp_path: Path, tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi " * 300}]}) + "\n")
    windows = token_windows(source(path, samples=1), tokenizer)
    assert tokenizer.decode(windows[0]).startswith("[user]hi")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "no rows"),
        ('{"text": "short"}\n', "fills 0 windows of 32 tokens; 4 are asked for. Lower `length`, or"),
        ('{"text": "fine"}\nnot json\n', "rows.jsonl:2: not JSON"),
        ('{"body": "x"}\n', "rows.jsonl:1: no 'text'"),
    ],
)
def test_text_that_does_not_do(tmp_path: Path, tokenizer: Any, content: str, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(QtoolError) as error:
        token_windows(source(path), tokenizer)
    assert expected in error.value.message
    assert error.value.exit_code == 2


def test_line_separators_inside_a_json_string_end_no_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ["a\u2028b", "c\u0085d\u2029"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\r\n".join(lines), encoding="utf-8")
    assert [row for _, row in read_rows(source(path))] == texts


def test_a_missing_file_and_a_column(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(QtoolError, match="no file"):
        token_windows(source(tmp_path / "absent.txt"), tokenizer)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "x"}\n')
    assert [row for _, row in read_rows(source(path, column="body"))] == ["x"]


def test_shipped_texts_are_there(tokenizer: Any) -> None:
    for name in ("qtool-code", "heldout-code"):
        assert token_windows(source(name, samples=16, length=128), tokenizer).shape == (16, 128)


def test_a_data_set_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(QtoolError, match=r"some/dataset.*Offline") as error:
        token_windows(source("some/dataset"), tokenizer)
    assert error.value.exit_code == 3
