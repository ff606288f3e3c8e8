"""Calibration and evaluation text from every kind of place, and how it becomes windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import QtoolError
from qtool.convert.text.source import TextSource
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.text.windows import read_rows, token_windows
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


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": ""}] * 2000, "2000 rows, none of them with text"),
        ([{"text": " \n"}, {"text": None}], "2 rows, none of them with text"),
        ([{"messages": [{"role": "user", "content": ""}]}] * 9, "9 rows, none of them with text"),
    ],
)
def test_rows_without_text_do_not_count(tmp_path: Path, tokenizer: Any, rows: list[Any], said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(QtoolError, match=said):
        token_windows(source(path), tokenizer)
    path.write_text("\n".join(map(json.dumps, [*rows, {"text": "word " * 200}, *rows])))
    windows = token_windows(source(path), tokenizer)
    assert not (windows == tokenizer.eos_token_id).any()


def test_a_tokenizer_that_leaves_nothing_fills_no_window(tmp_path: Path, tiny: Path) -> None:
    from tokenizers import Regex, normalizers

    tokenizer = load_tokenizer(tiny)
    tokenizer._tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]"), "")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps({"text": "a"})] * 500))
    with pytest.raises(QtoolError, match="fills 0 windows"):
        token_windows(source(path), tokenizer)


@pytest.mark.parametrize("name", ["a.md", "a.PY", "NOTES", "a.txt.gz", "A.TXT"])
def test_text_files_of_any_name(tmp_path: Path, tokenizer: Any, name: str) -> None:
    import gzip

    path = tmp_path / name
    data = b"def f(a):\n    return a\n" * 40
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert tokenizer.decode(token_windows(source(path), tokenizer)[0]).startswith("def f(a):\n    return a\n")


def test_what_is_there_is_never_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the network"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org/data").write_bytes(b"caf\xe9 " * 99)
    (tmp_path / "img.png").write_bytes(b"\x89PNG\0\0" * 99)
    for name, said in (
        ("org/data", "not UTF-8 .*Latin-1"), ("org", "is a folder"), ("img.png", "null characters"),
        ("absent.json", "no file"), ("./absent", "no file"), ("a/b/c", "no file"), ("~nouser_x/a", "no such user"),
        ("a\0b", "cannot hold"), ("x" * 5000, "too long"), ("/dev/zero", "is a device"),
    ):  # fmt: skip
        with pytest.raises(QtoolError, match=said) as error:
            token_windows(source(name), tokenizer)
        assert error.value.exit_code == 2


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path, tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuses + "{{ messages[0].content }}"
    path = tmp_path / "rows.jsonl"
    fine, bad = ({"messages": [{"role": role, "content": "x"}]} for role in ("user", "system"))
    path.write_text("\n".join(map(json.dumps, [fine, fine, bad])))
    with pytest.raises(QtoolError, match=r"rows.jsonl:3: the model's chat template refuses this row: no system"):
        token_windows(source(path), tokenizer)


def test_tokens_without_a_row_in_the_model_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("some text " * 100)
    most = int(token_windows(source(path), tokenizer).max())
    assert token_windows(source(path), tokenizer, most + 1).shape == (4, 32)
    with pytest.raises(QtoolError, match=f"token {most} .*embedding has {most} rows"):
        token_windows(source(path), tokenizer, most)


def test_a_long_text_is_encoded_in_parts(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("".join(f"line {i}\n" for i in range(300)))
    whole = token_windows(source(path), tokenizer)
    monkeypatch.setattr("qtool.convert.text.windows.PIECE", 50)
    assert torch.equal(whole, token_windows(source(path), tokenizer))
    path.write_text("ab" * 3000)  # one line
    assert tokenizer.decode(token_windows(source(path), tokenizer).flatten()).startswith("abab" * 16)
