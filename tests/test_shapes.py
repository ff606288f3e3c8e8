"""Rows of text in the shapes that people keep them in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qtool import QtoolError
from qtool.convert.text.shapes import has_text, row_of

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


@pytest.mark.parametrize(
    ("record", "row"),
    [
        ("plain", "plain"),
        ({"text": "a"}, "a"),
        ({"content": "a", "path": "x.py"}, "a"),
        ({"code": "a"}, "a"),
        ({"text": None}, ""),
        ({"text": "", "messages": [U]}, [U]),
        ({"messages": None, "text": ""}, ""),
        ({"messages": [U, A]}, [U, A]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, [U, A]),
        ({"conversations": [{"from": "User", "value": "hi", "weight": None}]}, [U]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"text": "i"}]}]}, [U]),
        ({"messages": [{"role": "model", "content": "yes", "tool_calls": []}]}, [A]),
        ({"messages": [U | {"name": None}, A]}, [U, A]),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": CALL}]},
            [{"role": "assistant", "content": "", "tool_calls": CALL}],
        ),
        (
            {"messages": [{"role": "tool", "tool_call_id": "1", "content": "4"}]},
            [{"role": "tool", "content": "4", "tool_call_id": "1"}],
        ),
        ({"messages": json.dumps([U, A])}, [U, A]),
        ({"prompt": "hi", "response": "yes"}, [U, A]),
        ({"prompt": [U], "completion": [A]}, [U, A]),
        ({"question": "hi", "answer": "yes"}, [U, A]),
        ({"instruction": "hi", "input": "", "output": "yes"}, [U, A]),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "yes", "system": "Be brief."},
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add.\n\n1, 2"}, A],
        ),
    ],
)
def test_shapes_that_are_read(record: Any, row: Any) -> None:
    assert row_of(record, None, "f:1") == row


@pytest.mark.parametrize(
    ("record", "column", "said"),
    [
        ([1], None, "f:1: a JSON list"),
        (3, None, "f:1: a JSON int"),
        ({"foo": "a", "bar": 1}, None, "f:1: no 'text' in it. The row has 'foo', 'bar'"),
        ({}, None, "no keys"),
        ({"text": "a"}, "body", "f:1: no key 'body' .*The row has 'text'"),
        ({"body": 3}, "body", "key 'body': is a int"),
        ({"text": {"a": 1}}, None, "key 'text': is a dict"),
        ({"messages": ["hi"]}, None, r"key 'messages'\[0\]: is a str"),
        ({"messages": [U, {"role": "user"}]}, None, r"key 'messages'\[1\]: has 'role'"),
        ({"messages": [{"content": "x"}]}, None, r"\[0\]: has 'content'"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, None, r"\[0\]: 'role' is 'narrator'"),
        ({"messages": [{"role": 3, "content": "x"}]}, None, r"\[0\]: has "),
        ({"messages": [{"role": "user", "content": 5}]}, None, r"\[0\].content: is a int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            None,
            r"key 'messages'\[0\].content\[0\]: a part of type 'image_url'",
        ),
        ({"conversations": [{"from": "human", "value": None}, {"from": "x", "value": ""}]}, None, r"\[1\]: 'from' is"),
    ],
)
def test_shapes_that_are_refused_naming_row_and_key(record: Any, column: str | None, said: str) -> None:
    with pytest.raises(QtoolError, match=said) as caught:
        row_of(record, column, "f:1")
    assert caught.value.exit_code == 2


def test_a_column_holds_text_or_messages() -> None:
    assert row_of({"text": "a", "chosen": [U, A]}, "chosen", "f:1") == [U, A]
    assert row_of({"text": "a", "body": "b"}, "body", "f:1") == "b"
    assert row_of({"body": None}, "body", "f:1") == ""


def test_what_counts_as_text() -> None:
    assert [has_text(row) for row in ("", " \n", "a", [], [U | {"content": " "}], [U | {"content": ""}, A])] == [
        False, False, True, False, False, True,
    ]  # fmt: skip
