"""Templates of strangers: rendered in a child that a limit ends."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qtool import QtoolError
from qtool.convert.text import bounded as bounded_module
from qtool.convert.text.bounded import Overrun, bounded
from qtool.convert.text.templates import Rendered, render_chats
from qtool.convert.text.tokenizer import load_tokenizer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return load_tokenizer(tiny)


def rendered(tokenizer: Any, template: Any, *chats: Any, **options: Any) -> list[Rendered]:
    tokenizer.chat_template = template
    return render_chats(tokenizer, chats or [HELLO], ["a.jsonl:1", "a.jsonl:2"], **options)


def test_many_conversations_take_one_child(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forks: list[int] = []
    fork = os.fork
    monkeypatch.setattr(os, "fork", lambda: forks.append(1) or fork())
    template = "{{ bos_token }}{{ messages[0].content }}{% if add_generation_prompt %}?{% endif %}"
    chats = [[{"role": "user", "content": f"n{i}"}] for i in range(300)]
    tokenizer.chat_template = template
    found = render_chats(tokenizer, chats, add_generation_prompt=True)
    assert [r.text for r in found] == [
        tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats
    ]
    assert found[7].text.endswith("n7?")
    assert len(forks) == 1


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ nope.a.b }}", "'nope' is undefined"),
        ("{% if %}", "Expected an expression"),
        ("{{ 1/0 }}", "division by zero"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
    ],
)
def test_what_a_template_refuses_is_said_of_that_conversation(tokenizer: Any, template: str, reason: str) -> None:
    text, refusal = vars(rendered(tokenizer, template)[0]).values()
    assert text == ""
    assert reason in refusal


def test_a_limit_names_the_conversation(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.convert.text.templates.SECONDS", 0.0)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    other = [{"role": "user", "content": "go"}]
    with pytest.raises(QtoolError, match=r"a.jsonl:2: the model's chat template takes more than 0 s"):
        rendered(tokenizer, "{% if messages[0].content == 'go' %}" + loops + "{% endif %}", HELLO, other)
    with pytest.raises(QtoolError, match=r"a.jsonl:1: the model's chat template takes more than 1024 MiB"):
        rendered(tokenizer, "{{ 'a' * 10**11 }}")


def test_values_before_the_end_are_kept() -> None:
    def dies() -> Iterator[Any]:
        yield {"fault": "no fault"}
        yield 2
        os.abort()

    with pytest.raises(Overrun, match="memory") as caught:
        bounded(dies)
    assert caught.value.done == [{"fault": "no fault"}, 2]

    def raises() -> Iterator[Any]:
        yield 1
        raise KeyError("x")

    with pytest.raises(Overrun, match="ended in KeyError: 'x'"):
        bounded(raises)
    with pytest.raises(Overrun, match="of text"):
        bounded(lambda: ["x" * 500] * 100, answer=1000)


def test_a_child_that_waits_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_module, "IDLE", 1.0)
    with pytest.raises(Overrun, match="hangs: 1 s without a sign of life"):
        bounded_module.bounded(lambda: [threading.Event().wait()], seconds=0.2)


def test_a_system_without_fork_does_the_work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fork")
    assert bounded(lambda: [os.getpid()]) == [os.getpid()]


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a socket"])
def test_the_child_opens_files_alone(tmp_path: Path, kind: str) -> None:
    """Nobody writes into the pipe: opened, it would wait until IDLE."""
    there, file = tmp_path / "HEAD", tmp_path / "file"
    file.write_text("text")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as bound:
        if kind == "a pipe":
            os.mkfifo(there)
        elif kind == "a socket":
            bound.bind(str(there))
        else:
            there.symlink_to("/dev/zero")
        assert bounded(lambda: [file.read_text(), len(os.listdir(tmp_path))]) == ["text", 2]
        for opened in (lambda: os.open(there, os.O_RDONLY), lambda: there.read_bytes()):
            with pytest.raises(Overrun, match=f"QtoolError: {there}: is {kind}, not a file."):
                bounded(lambda opened=opened: [opened()])
