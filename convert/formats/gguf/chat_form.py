"""What stands around the messages of a conversation: learnt from a chat template by rendering it, not by reading it.

A template is a program; Ollama's own language and llama.cpp's checks want plain text. Conversations of marked messages
are rendered and cut at the marks; what is left must put other conversations together exactly, or nothing is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qtool.convert.text.templates import Chat, Rendered, render_chats

SYSTEM, USER, ANSWER, SECOND, REPLY, THIRD = (
    {"role": role, "content": f"Qtool{word}"}
    for role, word in (
        ("system", "Rules"), ("user", "Asks"), ("assistant", "Answers"), ("user", "Continues"),
        ("assistant", "Replies"), ("user", "Ends"),
    )
)  # fmt: skip
CHATS: dict[str, Chat] = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, SECOND],
    "system and turns": [SYSTEM, USER, ANSWER, SECOND],
    "long": [USER, ANSWER, SECOND, REPLY, THIRD],
    "blanks": [{"role": "user", "content": " QtoolAsks\n"}],
    "thoughts": [USER, {"role": "assistant", "content": "<think>\nQtoolThinks\n</think>\n\nQtoolAnswers"}, SECOND],
}
TOOL = {
    "type": "function",
    "function": {"name": "qtool_look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}
LIMIT = 100_000  # characters around the messages of a conversation; more is no template


@dataclass(frozen=True)
class ChatForm:
    """``bare``: before the first user's mark without a system text; ``system``: around one (None: the template takes
    none); ``user``, ``answer``: around those; ``opening``: before the model's reply. ``default``: the system text that
    ``bare`` holds."""

    bare: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    answer: tuple[str, str]
    opening: str
    default: str = ""

    def text(self, chat: Chat) -> str:
        """``chat`` with the opening of a reply."""
        first = chat[0]["role"] == "system" and self.system is not None
        parts = [chat[0]["content"].join(self.system) if first and self.system else self.bare]
        around = {"user": self.user, "assistant": self.answer}
        parts += [message["content"].join(around[message["role"]]) for message in chat if message["role"] in around]
        return "".join(parts) + self.opening


@dataclass(frozen=True)
class Learnt:
    """``form``: None where ``why`` says what stood against it; ``lost``: what the form does not do; ``prompts``: the
    template's own text of conversations, to be tokenized by others."""

    form: ChatForm | None
    why: str = ""
    lost: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()


def learn(tokenizer: Any) -> Learnt | None:
    """The form of ``tokenizer``'s chat template, None where it has none. Raises QtoolError for a template that breaks
    the limits of `render_chats`."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    given = dict(zip(CHATS, render_chats(tokenizer, list(CHATS.values()), add_generation_prompt=True), strict=True))
    if given["user"].refusal:
        return Learnt(None, f"it refuses one message of a user ({given['user'].refusal})", _others(template))
    prompts = tuple(text.text for text in given.values() if not text.refusal)
    if max(map(len, prompts)) > LIMIT:
        return Learnt(None, f"it writes more than {LIMIT:,} characters around a message", _others(template))
    if "strftime_now" in str(template):
        return Learnt(None, "it tells the day's date", _others(template), prompts)
    (closed,) = render_chats(tokenizer, [CHATS["user"]], add_generation_prompt=False)
    (tools,) = render_chats(tokenizer, [CHATS["user"]], add_generation_prompt=True, tools=[TOOL])
    form = _form(given, closed, getattr(tokenizer, "bos_token", None) or "")
    if form is None:
        return Learnt(None, "its text around a message depends on more than the role", _others(template), prompts)
    for name in ("user", "system", "turns", "system and turns", "long"):
        if not given[name].refusal and form.text(CHATS[name]) != given[name].text:
            return Learnt(None, f"it puts {name!r} together in a way of its own", _others(template), prompts)
    return Learnt(form, "", (*_lost(form, given, tools), *_others(template)), prompts)


def _form(given: dict[str, Rendered], closed: Rendered, bos: str) -> ChatForm | None:
    """The form that "user" (with and without the opening), "turns" and "system and turns" show; None where a message
    is not in its text just once."""
    user, turns, whole = given["user"].text, given["turns"].text, given["system and turns"].text
    opening = user[len(closed.text) :] if not closed.refusal and user.startswith(closed.text) else ""
    plain = _cut(turns, CHATS["turns"])
    if plain is None or not plain[3].endswith(opening):
        return None
    begin, middle, between, end = plain
    after = end[: len(end) - len(opening)]
    if not middle.startswith(after):
        return None
    system = None
    if not given["system and turns"].refusal and not given["system"].refusal:
        found = _cut(whole, CHATS["system and turns"])
        if found is None or found[2:] != [middle, between, end]:
            return None
        system = (found[0], found[1])
    before = _common_end(begin, between, *([system[1]] if system else []))
    if after and between.startswith(after) and before.endswith(between[len(after) :]):
        before = between[len(after) :]  # the mark that ends a turn belongs to that turn
    if begin.startswith(bos):  # what a text begins with belongs to no message
        before = before[max(0, len(bos) + len(before) - len(begin)) :]
    cut = -len(before) or None
    default = ""
    if system and begin.startswith(system[0]) and begin.endswith(system[1]):
        default = begin[len(system[0]) : len(begin) - len(system[1])]
    return ChatForm(
        begin[:cut], (system[0], system[1][:cut]) if system else None, (before, after),
        (middle[len(after) :], between[:cut]), opening, default,
    )  # fmt: skip


def _cut(text: str, chat: Chat) -> list[str] | None:
    parts, rest = [], text
    for message in chat:
        if rest.count(message["content"]) != 1:
            return None
        part, _, rest = rest.partition(message["content"])
        parts.append(part)
    return [*parts, rest]


def _common_end(*texts: str) -> str:
    same = 0
    for letters in zip(*(reversed(text) for text in texts), strict=False):
        if len(set(letters)) > 1:
            break
        same += 1
    return texts[0][len(texts[0]) - same :]


def _lost(form: ChatForm, given: dict[str, Rendered], tools: Rendered) -> tuple[str, ...]:
    found = []
    if form.system is None:
        found.append(f"a system text is left out: the template refuses one ({given['system'].refusal})")
    if not tools.refusal and tools.text != given["user"].text:
        found.append("tools: the template tells the model of them, the TEMPLATE does not")
    if given["blanks"].text != form.text(CHATS["blanks"]):
        found.append("white space around a message: the template takes it off, the TEMPLATE keeps it")
    if given["thoughts"].text != form.text(CHATS["thoughts"]):
        found.append("thoughts in earlier answers: the template takes them out, the TEMPLATE keeps them")
    return tuple(found)


def _others(template: Any) -> tuple[str, ...]:
    """The templates with names of their own beside the default one."""
    names: Sequence[str] = [str(name) for name in template if name != "default"] if isinstance(template, dict) else []
    return (f"templates for other ends: {', '.join(names)}",) if names else ()
