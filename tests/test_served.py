"""The openai engine against real servers on the loopback interface: one that misbehaves on purpose, and llama.cpp's."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner

from qtool import QtoolError
from qtool.cli import main
from qtool.evaluate.engines import server as served
from qtool.evaluate.engines.engine import Decoding, Request
from qtool.evaluate.engines.openai import connect
from qtool.evaluate.tasks.loading import load_task, subset

KEY = "sk-secret-0123456789"


class Server(ThreadingHTTPServer):
    """Says ``answers[prompt]``, after the failures that ``faults`` lists."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, str] = {}
        self.faults: list[str] = []
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models = ["coder"]
        self.most = self.now = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        rows = [{"owned_by": "fakeserver"} | ({"id": name} if name else {}) for name in self.server.models]
        self.reply(200, json.dumps({"object": "list", "data": rows}).encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.append(self.headers["Authorization"])
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault == "busy":
            return self.reply(503, b"loading", Retry_After="0")
        if fault == "refused":
            return self.reply(401, f"bad key {self.headers['Authorization']}".encode())
        if fault == "moved":
            return self.reply(307, b"", Location="http://127.0.0.1:1/elsewhere")
        self.server.seen.append(asked)
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        chat = self.path.endswith("/chat/completions")
        prompt = asked["messages"][-1]["content"] if chat else asked["prompt"]
        text = self.server.answers.get(prompt, "?")
        time.sleep(0.02)  # so that requests meet
        with self.server.lock:  # before the answer: whoever has it may ask again at once
            self.server.now -= 1
        self.send_response(200)
        self.end_headers()
        try:
            if fault.startswith("odd "):
                self.wfile.write(f"data: {fault[4:]}\n\n".encode())
                return None
            while fault == "endless":
                self.wfile.write(b'data: {"choices": [{"text": "x"}]}\n\n')
            for start in range(0, len(text), 8):
                piece = text[start : start + 8]
                event = {"choices": [{"delta": {"content": piece}} if chat else {"text": piece}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                if fault == "torn":
                    return None
            self.wfile.write(b'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n')
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has what it wants
        return None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(served, "RETRY_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(server: Server, prompts: list[str], done: tuple[int, ...] = (), **changes: Any) -> dict[int, str]:
    requests = [Request(prompt, lambda text: "STOP" in text, seed=7) for prompt in prompts]
    decoding = Decoding(**({"max_new_tokens": 16, "batch_size": 4} | changes))
    return dict(connect(server.url, None).generate(requests, decoding, done))


def test_completions_are_greedy_and_parallel(server: Server) -> None:
    server.answers = {f"p{i}": f"answer {i} " * 40 for i in range(12)}
    found = ask(server, list(server.answers), done=(3,))
    assert found == {i: f"answer {i} " * 40 for i in range(12) if i != 3}
    assert {row.pop("prompt") for row in server.seen} == set(server.answers) - {"p3"}
    greedy = {"model": "coder", "max_tokens": 16, "stream": True, "temperature": 0.0}
    assert all(row == greedy for row in server.seen)
    assert 1 < server.most <= 4


def test_samples_carry_their_seed(server: Server) -> None:
    ask(server, ["p"], temperature=0.8, top_p=0.95)
    assert {k: server.seen[0][k] for k in ("temperature", "top_p", "seed")} == {
        "temperature": 0.8, "top_p": 0.95, "seed": 7,
    }  # fmt: skip


def test_a_finished_answer_is_not_read_to_its_end(server: Server) -> None:
    server.answers = {"p": "x = 1 STOP" + " more" * 10_000}
    assert len(ask(server, ["p"])[0]) < 30


@pytest.mark.parametrize("faults", [["busy", "busy"], ["torn"], ["busy", "torn", "busy"]])
def test_a_busy_server_and_a_torn_answer_are_tried_again(server: Server, faults: list[str]) -> None:
    server.answers = {"p": "a long answer in several pieces"}
    server.faults = faults
    assert ask(server, ["p"]) == {0: "a long answer in several pieces"}


def test_the_last_failure_is_said(server: Server) -> None:
    server.faults = ["busy"] * 5
    with pytest.raises(QtoolError, match=r"answered 503: loading, 5 times\. Is the server running\?") as caught:
        ask(server, ["p"])
    assert caught.value.exit_code == 3


def test_the_key_goes_into_one_header_only(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    engine = connect(server.url, None)
    assert KEY not in repr(engine)
    server.faults = ["refused"]
    with pytest.raises(QtoolError, match=r"answered 401: bad key Bearer \*\*\*") as caught:
        list(engine.generate([Request("p", lambda _: False)], Decoding(4, 1)))
    assert server.keys == [f"Bearer {KEY}"]
    assert KEY not in str(caught.value)
    server.faults = ["moved"]
    with pytest.raises(QtoolError, match="answered 307"):
        list(engine.generate([Request("p", lambda _: False)], Decoding(4, 1)))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/v1", "no answer"), ("localhost:8000", "give the address that ends"),
        ("http://me:secret@127.0.0.1/v1", "a key does not belong into the address"),
    ],
)  # fmt: skip
def test_addresses_that_cannot_work(url: str, message: str) -> None:
    with pytest.raises(QtoolError, match=message) as caught:
        connect(url, None)
    assert "secret" not in str(caught.value)


def test_the_model_must_be_there(server: Server) -> None:
    with pytest.raises(QtoolError, match="does not serve 'other'; it has coder"):
        connect(server.url, "other")
    server.models = ["a", "b"]
    with pytest.raises(QtoolError, match="serves a, b; name one: MODEL of `qtool evaluate`, --name of `qtool measure`"):
        connect(server.url, None)
    assert connect(server.url, "b").version.startswith("fakeserver, BaseHTTP")


@pytest.mark.slow
@pytest.mark.parametrize("style", ["completion", "chat"])
def test_evaluate_a_served_model(server: Server, tmp_path: Any, style: str) -> None:
    """Every second problem is answered right."""
    from qtool.evaluate.tasks.prompts import messages

    problems = subset(load_task("handwritten"), 20).problems
    for problem in problems[::2]:
        if style == "chat":
            whole = problem.prompt + problem.canonical_solution
            server.answers[messages(problem)[-1]["content"]] = f"```python\n{whole}\n```"
        else:
            server.answers[problem.prompt] = problem.canonical_solution
    arguments = ["evaluate", "--engine", "openai", "--base-url", server.url, "--task", "handwritten"]
    arguments += ["--limit", str(len(problems))]
    arguments += ["--prompt", style, "--runs", str(tmp_path)]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*/scores/handwritten*.json")
    score = json.loads(path.read_text())
    passed = [outcome["outcome"] == "passed" for outcome in score["outcomes"].values()]
    assert passed == [number % 2 == 0 for number in range(len(problems))]
    assert score["settings"]["engine"] == "openai"
    assert score["settings"]["version"].startswith("fakeserver")
    assert score["subject"] == "coder"


def test_a_recipe_and_its_address_go_together() -> None:
    for arguments, message in (
        (["--engine", "openai"], "`base_url:` and `engine: openai` go together"),
        (["--engine", "openai", "--base-url", "http://a:pw@h/v1"], "`base_url:` holds a password"),
        (["m", "--samples", "3"], "set `temperature: 0.8`"),
        (["m", "--text", "heldout-code", "--engine", "vllm"], "need all logits, which engine vllm does not give"),
    ):
        result = CliRunner().invoke(main, ["evaluate", *arguments, "--task", "handwritten"])
        assert result.exit_code == 2
        assert message in result.output


def test_a_list_of_models_without_names_is_no_answer(server: Server) -> None:
    server.models = [None]  # type: ignore[list-item]  # said as a row without a key "id"
    with pytest.raises(QtoolError, match="not an OpenAI-compatible answer"):
        connect(server.url, None)


def test_a_character_cut_in_half_is_put_together_or_replaced(server: Server) -> None:
    """Servers that cut a text between UTF-16 halves: what is left of it can be saved as UTF-8."""
    server.answers = {"whole": "1234567\ud83d\ude00 end", "half": "1234567\ud83d"}
    assert ask(server, ["whole", "half"]) == {0: "1234567\U0001f600 end", 1: "1234567\ufffd"}


@pytest.mark.parametrize(
    "event",
    ["5", "[1]", '"text"', "null", '{"choices": 5}', '{"choices": [5]}', '{"choices": [{"text": 5}]}', "{",
     '{"choices": [{"text": ["a"]}]}', '{"choices": [{"delta": "a"}]}', "a"],
)  # fmt: skip
def test_an_event_of_another_kind_is_asked_for_again_and_then_said(server: Server, event: str) -> None:
    server.answers = {"p": "right"}
    server.faults = [f"odd {event}"]
    assert ask(server, ["p"]) == {0: "right"}
    server.faults = [f"odd {event}"] * 5
    with pytest.raises(QtoolError, match=r"the answer (broke off|holds something else)") as caught:
        ask(server, ["p"])
    assert caught.value.exit_code == 3


def test_a_server_that_heeds_no_limit_is_named(server: Server) -> None:
    server.faults = ["endless"]
    with pytest.raises(QtoolError, match="goes on beyond max_tokens, 16"):
        ask(server, ["p"])
