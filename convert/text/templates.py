"""A model's chat template, rendered within limits: templates are programs that strangers wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qtool import QtoolError
from qtool.convert.text.bounded import SECONDS, Overrun, bounded

Chat = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """One conversation as the template wrote it; or, where the template refused it, an empty text and the reason."""

    text: str
    refusal: str = ""


def render_chats(tokenizer: Any, chats: Sequence[Chat], names: Sequence[str] = (), **options: Any) -> list[Rendered]:
    """Each conversation through ``tokenizer.apply_chat_template`` (``options``: its own, as add_generation_prompt), all
    in one child process under limits of time and memory.

    A template that refuses a conversation (raise_exception, an undefined name, a syntax error) is a `Rendered` with a
    refusal. Raises QtoolError (exit 2) where it breaks a limit, naming the conversation by ``names``.
    """
    if not chats:
        return []

    def work() -> Iterator[list[str]]:
        for chat in chats:
            made = render_one(tokenizer, chat, **options)
            yield [made.text, made.refusal]

    try:
        return [Rendered(*pair) for pair in bounded(work, SECONDS + 0.02 * len(chats))]
    except Overrun as error:
        place = f"{names[len(error.done)]}: " if len(error.done) < len(names) else ""
        raise QtoolError(f"{place}the model's chat template {error.reason}.") from error


def render_one(tokenizer: Any, chat: Chat, **options: Any) -> Rendered:
    """One conversation, without limits: for work that is `bounded` already."""
    try:
        text = tokenizer.apply_chat_template(list(chat), tokenize=False, **options)
    except MemoryError:
        raise
    except Exception as error:  # jinja's, and whatever a template's own filters raise
        return Rendered("", " ".join(str(error).split())[:300] or type(error).__name__)
    return Rendered(text) if isinstance(text, str) else Rendered("", f"gives a {type(text).__name__}, not text")
