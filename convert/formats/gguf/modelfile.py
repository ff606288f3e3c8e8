"""An Ollama Modelfile for a .gguf file. Format: https://github.com/ollama/ollama/blob/main/docs/modelfile.md"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.convert.formats.gguf.chat_form import ChatForm, Learnt
from qtool.convert.formats.gguf.stops import Stops
from qtool.convert.formats.gguf.vocab import begins_with_bos

MODELFILE = "Modelfile"
WITHOUT = (
    "Without TEMPLATE, Ollama takes the template it ships whose source is nearest to the .gguf file's, if one is near; "
    "else it hands the prompt to the model as it is."
)  # template/template.go, Named


@dataclass(frozen=True)
class Modelfile:
    """The file's text; ``notes``: what it does not say as the model does."""

    text: str
    notes: list[str]


def modelfile(
    file: str, chat: Learnt | None, stops: Sequence[str], bos: str | None = None, added: Collection[str] = ()
) -> Modelfile:
    """``chat``: the form of the chat template (None: the model has none); ``stops``: texts of the tokens to stop at;
    ``bos``: the text of the token that llama.cpp puts before every prompt, which a TEMPLATE must not repeat; ``added``:
    tokens beside the vocabulary, among which the end of an answer is looked for."""
    lines, notes = [f"FROM ./{file}"], []
    if chat is not None:
        why = _unsayable(chat.form) if chat.form else chat.why
        if chat.form and not why:
            lines += _template(chat.form, bos)
            notes += [f"Modelfile: {lost}" for lost in chat.lost]
            if bos and not chat.form.bare.startswith(bos):
                notes.append(f"Modelfile: Ollama begins every prompt with {bos!r}, the chat template does not")
            end = chat.form.answer[1].strip()
            stops = [*stops, end] if end in added else stops
        else:
            notes.append(f"Modelfile: no TEMPLATE says what the chat template does: {why}. {WITHOUT}")
            notes += [f"Modelfile: {lost}" for lost in chat.lost]
            lines.append(f"# No TEMPLATE says what the chat template does: {' '.join(why.split())}. {WITHOUT}")
    for stop in dict.fromkeys(stops):
        if stop.isprintable() and stop.strip() and not stop.startswith('"'):
            lines.append(f'PARAMETER stop "{stop}"')  # Ollama's parser knows no escapes
        else:
            notes.append(f"Modelfile: cannot name the stop {stop!r}")
    return Modelfile("\n".join([*lines, "PARAMETER temperature 0"]) + "\n", notes)


def modelfile_of(folder: Path, file: str, tokenizer: Any, chat: Learnt | None, stops: Stops) -> Modelfile:
    """Of the model in ``folder``, whose weights are ``file``."""
    bos = tokenizer.bos_token if begins_with_bos(folder, tokenizer) else None
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return modelfile(file, chat, stops.texts, bos, added)


def _template(form: ChatForm, bos: str | None) -> list[str]:
    text = template(form, bos)
    lines = [f'TEMPLATE """{text}"""']
    if form.default and _quotable(form.default):
        lines.append(f'SYSTEM """{form.default}"""')
    return lines


def template(form: ChatForm, bos: str | None = None) -> str:
    """``form`` in Go's template language, as Ollama fills it: .System is the system text of the conversation or of
    SYSTEM, .Messages all messages. No action trims the text beside it."""

    def around(pair: tuple[str, str], field: str) -> str:
        return f"{_literal(pair[0])}{{{{ .{field} }}}}{_literal(pair[1])}"

    head = _literal(form.bare.removeprefix(bos or ""))
    if form.system is not None:
        system = around((form.system[0].removeprefix(bos or ""), form.system[1]), "System")
        head = f"{{{{ if .System }}}}{system}{'{{ else }}' if head else ''}{head}{{{{ end }}}}"
    user, answer = around(form.user, "Content"), around(form.answer, "Content")
    return (
        f'{head}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
        f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}{_literal(form.opening)}'
    )


def _literal(text: str) -> str:
    """Plain text in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def _unsayable(form: ChatForm) -> str:
    if not _quotable(template(form)):
        return "its text holds quotes where they would end it in a Modelfile"
    return ""


def _quotable(text: str) -> bool:
    """Whether text can stand between triple quotes: no escape is known there."""
    return '"""' not in f"{text}x" and not text.endswith('"') and not text.startswith('"') and "\0" not in text
