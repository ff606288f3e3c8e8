"""The Modelfile: what Ollama makes of it equals what the chat template renders, or the difference is said."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qtool import QtoolError
from qtool.convert.formats.gguf import chat_form
from qtool.convert.formats.gguf.chat_form import CHATS, learn
from qtool.convert.formats.gguf.modelfile import Modelfile, modelfile, template
from qtool.convert.text.tokenizer import load_tokenizer

DEMO = Path(__file__).parents[1] / "pipeline/data/demo-model"
CHATML = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- else %}{{- 'DEFAULT' }}{%- endif %}{%- for m in messages %}{%- if m.role != 'system' %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\nTHINK' }}{%- endif %}"
)
WORDS = 'You are "T" {{ by }} E.'
TEMPLATES = {
    "chatml": CHATML.replace("DEFAULT", "").replace("THINK", ""),
    "default": CHATML.replace("DEFAULT", '<|im_start|>system\nYou are "T" {{ by }} E.<|im_end|>\n').replace(
        "THINK", ""
    ),
    "empty system": CHATML.replace("DEFAULT", "<|im_start|>system\n<|im_end|>\n").replace("THINK", ""),
    "thinking": CHATML.replace("DEFAULT", "").replace("THINK", "<think>\n"),
    "llama 3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>"
    "\n\n{% endif %}",
    "llama 2": "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}<s>[INST] {{ (s if loop.first else '') + m.content }} [/INST]{% else %}"
    " {{ m.content }} </s>{% endif %}{% endfor %}",
    "no system": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
    "go's braces": "{% for m in messages %}{{ '{{ .Evil }}' }}{{ m.role }}: {{ m.content }}\n{% endfor %}",
}


def go(text: str, values: Mapping[str, Any]) -> str:
    """Go's text/template, as far as `template` uses it: if, else if eq, else, range, end, fields and strings."""
    parts = re.split(r"\{\{ (.*?) \}\}", text)
    place = 0

    def block(scope: Mapping[str, Any], live: bool) -> tuple[str, str]:
        """Text up to an `else …` or `end` of this block, and that word."""
        nonlocal place
        made = []
        while True:
            made.append(parts[place])
            if place + 1 == len(parts):
                return "".join(made) if live else "", ""
            action = parts[place + 1]
            place += 2
            if action == "end" or action.startswith("else"):
                return "".join(made) if live else "", action
            if action.startswith("if "):
                made.append(chain(action, scope, live))
            elif action == "range .Messages":
                start = place
                for message in scope["Messages"] or [{}]:
                    place = start
                    made.append(block(message, live and bool(message))[0])
            elif action.startswith('"'):
                made.append(action.strip('"'))
            else:
                made.append(scope.get(action.removeprefix("."), "") if live else "")

    def chain(action: str, scope: Mapping[str, Any], live: bool) -> str:
        made, open_ = "", live
        while action != "end":
            condition = action.removeprefix("else").strip().removeprefix("if ")
            role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
            holds = not condition or (scope.get("Role") == role[1] if role else bool(scope.get(condition[1:])))
            said, action = block(scope, open_ and holds)
            open_, made = open_ and not holds, made + said
        return made

    return block(values, True)[0]


def by_ollama(made: Modelfile, chat: Sequence[Mapping[str, str]]) -> str:
    """A conversation as Ollama hands it to the model (server/prompt.go): SYSTEM where it has no system text."""
    found = re.search(r'^TEMPLATE """(.*?)"""$', made.text, re.S | re.M)
    system = re.search(r'^SYSTEM """(.*?)"""$', made.text, re.S | re.M)
    assert found is not None
    if system and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": system[1]}, *chat]
    texts = [message["content"] for message in chat if message["role"] == "system"]
    messages = [{"Role": message["role"], "Content": message["content"]} for message in chat]
    return go(found[1], {"System": "\n\n".join(texts), "Messages": messages})


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(DEMO)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_prompts_as_the_chat_template_does(name: str, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    learnt = learn(tokenizer)
    assert learnt is not None
    made = modelfile("m.gguf", learnt, [])
    for label in ("user", "system", "turns", "system and turns", "long"):
        if name != "no system" or "system" not in label:
            wanted = tokenizer.apply_chat_template(list(CHATS[label]), tokenize=False, add_generation_prompt=True)
            # the table's cases have one shape
            assert by_ollama(made, CHATS[label]) == wanted, label  # type: ignore[arg-type]
    if name == "default":
        assert f'SYSTEM """{WORDS}"""\n' in made.text
    if name == "no system":
        assert any("the template refuses one (no system here)" in note for note in made.notes)


def test_the_words_of_a_plain_template(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES["thinking"]
    learnt = learn(tokenizer)
    assert learnt is not None
    assert learnt.form is not None
    assert template(learnt.form) == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        "<|im_start|>assistant\n<think>\n"
    )


def test_what_a_template_says_beyond_roles_is_told(tokenizer: Any) -> None:
    tokenizer.chat_template = {
        "default": TEMPLATES["chatml"].replace("m.content +", "(m.content.split('</think>')|last|trim) +"),
        "tool_use": "{{ tools }}{{ messages[0].content }}",
    }
    made = modelfile("m.gguf", learn(tokenizer), ["<|endoftext|>"], None, {"<|im_end|>"})
    assert "TEMPLATE" in made.text
    assert 'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n' in made.text
    told = " ".join(made.notes)
    for word in ("tools:", "white space around a message", "thoughts in earlier answers", "other ends: tool_use"):
        assert word in told


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for m in messages %}{{ strftime_now('%d') }}{{ m.content }}{% endfor %}", "the day's date"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% for m in messages %}{% if loop.last %}Now: {% endif %}{{ m.content }}\n{% endfor %}", "."),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "more than the role"),
        ('{% for m in messages %}"""\nFROM ./evil\n{{ m.content }}{% endfor %}', "quotes"),
        ("{{ messages[0].content }}{{ 'x' * 200000 }}", "more than 100,000 characters"),
        ({"tool_use": "x"}, "refuses one message of a user"),
    ],
)
def test_no_template_is_written_that_would_be_wrong(source: Any, why: str, tokenizer: Any) -> None:
    tokenizer.chat_template = source
    made = modelfile("m.gguf", learn(tokenizer), ["<|endoftext|>"])
    assert not re.search(r"^(TEMPLATE|SYSTEM|FROM \./evil)", made.text, re.M)
    comment = next(line for line in made.text.splitlines() if line.startswith("# "))
    for said in (comment, made.notes[0]):
        assert why in said
        assert "Without TEMPLATE, Ollama takes" in said


def test_a_bos_is_not_written_twice(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES["llama 3"]
    learnt, bos = learn(tokenizer), tokenizer.bos_token
    made = modelfile("m.gguf", learnt, [], bos)
    assert 'TEMPLATE """{{ if .System }}<|start_header_id|>system' in made.text
    assert bos not in made.text
    tokenizer.chat_template = TEMPLATES["chatml"]
    assert any("begins every prompt" in note for note in modelfile("m.gguf", learn(tokenizer), [], bos).notes)


def test_stops_that_would_break_out_of_their_line_are_left_out_and_said() -> None:
    made = modelfile("m.gguf", None, ["<e>", 'x"\nFROM evil', '"""', "\n", "<e>"])
    assert made.text == 'FROM ./m.gguf\nPARAMETER stop "<e>"\nPARAMETER temperature 0\n'
    assert len(made.notes) == 3


@pytest.mark.slow
def test_a_template_without_end_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtool.convert.text import templates

    monkeypatch.setattr(templates, "SECONDS", 1.0)
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(QtoolError, match="chat template takes more than"):
        learn(tokenizer)
    tokenizer.chat_template = None
    assert chat_form.learn(tokenizer) is None
