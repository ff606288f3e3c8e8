"""What a row of text is: plain text, or a conversation in one of the shapes that people keep conversations in.

    {"text": "…"}  {"content": "…"}  {"code": "…"}                           plain text
    {"messages": [{"role": …, "content": …}]}                               chat; content may be parts or null
    {"conversations": [{"from": "human", "value": …}]}                      ShareGPT
    {"instruction": …, "input": …, "output": …}  {"prompt": …, "response": …}   one question and its answer

A row in another shape is refused, naming it: guessing would calibrate on half of a text.
"""

from __future__ import annotations

import json
import re
from typing import Any

from qtool import QtoolError
from qtool.convert.files.reading import shown

Message = dict[str, Any]
Row = str | list[Message]  # plain text, or chat messages whose content is text
TEXTS = ("text", "content", "code")
CHATS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
PAIRS = (
    ("instruction", "output"), ("instruction", "response"), ("prompt", "response"), ("prompt", "completion"),
    ("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"),
    ("problem", "solution"), ("input", "output"),
)  # fmt: skip
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "bot": "assistant", "model": "assistant", "ai": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "function_response": "tool", "observation": "tool", "ipython": "ipython",
}  # fmt: skip
_HALF = re.compile("[\ud800-\udfff]")


def row_of(record: Any, column: str | None, where: str) -> Row:
    """The text of one row; "" where a row has the right key and no text. Raises QtoolError naming ``where`` and the
    key."""
    row = _row_of(record, column, where)
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    if _HALF.search(text):
        raise QtoolError(f"{where}: holds half of a character (a surrogate alone, as \\ud800): it is no text.")
    return row


def _row_of(record: Any, column: str | None, where: str) -> Row:
    if isinstance(record, str) and column is None:
        return record
    if not isinstance(record, dict):
        raise QtoolError(f'{where}: a JSON {type(record).__name__}, not a row like {{"text": …}}.')
    if column is not None:
        if column not in record:
            raise QtoolError(f"{where}: no key {column!r} (`column:`). The row has {_keys(record)}.")
        return _value(record[column], f"{where}: key {column!r}")
    if isinstance(record.get("text"), str) and record["text"].strip():
        return str(record["text"])
    for key in CHATS:
        if record.get(key) is not None:
            found = _value(record[key], f"{where}: key {key!r}")
            if isinstance(found, str):
                raise QtoolError(
                    f"{where}: key {key!r}: is text, not messages. If it is what to read: `column: {key}`."
                )
            return found
    for question, answer in PAIRS:
        if isinstance(record.get(question), str | list) and isinstance(record.get(answer), str | list):
            return _pair(record, question, answer, where)
    present = [key for key in TEXTS if key in record]
    for key in present:
        if record[key] is not None:
            return _value(record[key], f"{where}: key {key!r}")
    if present:
        return ""
    known = ", ".join([*TEXTS, *CHATS[:2], *(f"{a} with {b}" for a, b in PAIRS[:3])])
    raise QtoolError(
        f"{where}: no 'text' in it. The row has {_keys(record)}; qtool knows {known}. Name the key that holds text or "
        "messages with `column:`."
    )


def has_text(row: Row) -> bool:
    """Whether there is a letter in it: a conversation of empty messages is only a template's marks."""
    return bool(row.strip()) if isinstance(row, str) else any(said(message).strip() for message in row)


def said(message: Message) -> str:
    """What one message says, tool calls included, for a model without a chat template."""
    calls = message.get("tool_calls")
    return "\n".join([*filter(None, [message["content"]]), *([json.dumps(calls)] if calls else [])])


def _value(value: Any, where: str) -> Row:
    if value is None:
        return ""
    if isinstance(value, str):
        return _messages(json.loads(value), where) if _is_json_chat(value) else value
    if isinstance(value, list):
        return _messages(value, where)
    raise QtoolError(f"{where}: is a {type(value).__name__}, not text or messages.")


def _is_json_chat(text: str) -> bool:
    """A column of text that spells messages in JSON, as exports to CSV and parquet have."""
    if not text.lstrip().startswith("[{"):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in value)


def _messages(value: list[Any], where: str) -> list[Message]:
    return [_message(item, f"{where}[{number}]") for number, item in enumerate(value)]


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise QtoolError(f"{where}: is a {type(item).__name__}, not a message with 'role' and 'content'.")
    name = next((key for key in ("role", "from") if isinstance(item.get(key), str)), None)
    body = next((key for key in ("content", "value", "text") if key in item), None)
    if name is None or (body is None and not item.get("tool_calls")):
        raise QtoolError(f"{where}: has {_keys(item)}; a message has 'role' and 'content', or 'from' and 'value'.")
    role = ROLES.get(item[name].strip().lower())
    if role is None:
        known = ", ".join(sorted(set(ROLES.values())))
        raise QtoolError(f"{where}: {name!r} is {shown(item[name])!r}; qtool knows {known} (and human, gpt).")
    rest = {key: kept for key, kept in item.items() if key not in (name, body) and kept not in (None, [], {})}
    return {"role": role, "content": _content(item[body], f"{where}.{body}") if body else "", **rest}


def _content(value: Any, where: str) -> str:
    """Text of a content, whose parts are joined: templates of text models print a list as Python would."""
    if value is None:  # a turn that only calls tools
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise QtoolError(f"{where}: is a {type(value).__name__}, not text.")
    texts = []
    for number, part in enumerate(value):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise QtoolError(f"{where}[{number}]: a part of type {kind!r}, which is no text.")
    return "".join(texts)


def _pair(record: Message, question: str, answer: str, where: str) -> list[Message]:
    """Question and answer as two messages; each may itself be a list of messages (TRL's prompt and completion)."""
    found: list[Message] = []
    system = next((record[key] for key in ("system", "system_prompt") if isinstance(record.get(key), str)), "")
    if system.strip():
        found.append({"role": "system", "content": system})
    for key, role in ((question, "user"), (answer, "assistant")):
        value = record[key]
        if isinstance(value, list):
            found += _messages(value, f"{where}: key {key!r}")
            continue
        more = record.get("input") if key == "instruction" else None
        text = f"{value}\n\n{more}" if isinstance(more, str) and more.strip() else value
        found.append({"role": role, "content": text})
    return found


def _keys(record: Message) -> str:
    return shown(", ".join(repr(key) for key in record)) or "no keys"
