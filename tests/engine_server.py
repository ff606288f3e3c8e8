"""A server that looks like an engine, with faults planted: metrics and streamed completions, on the loopback."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent / "data" / "metrics"
VLLM, LLAMA = (PAGES / "vllm-0.32.0.txt").read_text(), (PAGES / "llama.cpp-b11549.txt").read_text()


class FakeEngine(ThreadingHTTPServer):
    """``pages``: what /metrics says, one after another, the last one for ever. ``faults``: of the next completions, in
    order: "", "torn", "garbage", "refused", "error", "stall". ``step``: seconds between tokens; ``slots``: requests
    that are worked on at a time."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.pages: list[str | bytes] = [VLLM]
        self.page_fault = ""
        self.refusal = b"this model takes no such thing"
        self.faults: list[str] = []
        self.step, self.stall = 0.0, 0.5
        self.slots = threading.Semaphore(64)
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.now = self.most = 0


class Handler(BaseHTTPRequestHandler):
    server: FakeEngine

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, code: int, body: bytes, promised: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) if promised is None else promised))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        if self.path == "/v1/models":
            return self.reply(200, json.dumps({"data": [{"id": "coder"}]}).encode())
        with self.server.lock:
            page = self.server.pages.pop(0) if len(self.server.pages) > 1 else self.server.pages[0]
        body = page.encode() if isinstance(page, str) else page
        fault = self.server.page_fault
        if fault == "missing":
            return self.reply(404, f"no such path, {self.headers['Authorization']}".encode())
        if fault == "torn":
            return self.reply(200, body[: len(body) // 2], promised=len(body))
        if fault == "trickle":
            self.send_response(200)
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
            return None
        return self.reply(200, body)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.left = False
            fault = self.server.faults.pop(0) if self.server.faults else ""
            self.server.seen.append(asked)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            with self.server.slots:
                self.answer(asked, fault)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            self.leave()

    def leave(self) -> None:
        """Before the last bytes: whoever has them may ask again at once."""
        with self.server.lock:
            self.server.now -= 0 if self.left else 1
            self.left = True

    def answer(self, asked: dict[str, Any], fault: str) -> None:
        if fault == "refused":
            return self.reply(400, self.server.refusal)
        if fault == "stall":
            time.sleep(self.server.stall)
        self.send_response(200)
        self.end_headers()
        for number in range(asked["max_tokens"]):
            if fault == "torn" and number == 1:
                return None
            if fault == "garbage":
                self.wfile.write(b"data: {nonsense\n\n")
                return None
            if fault == "error" and number == 1:
                self.wfile.write(b'data: {"error": {"message": "engine died"}}\n\n')
                return None
            time.sleep(self.server.step)
            last = number + 1 == asked["max_tokens"]
            event = {"choices": [{"text": "x", "finish_reason": "length" if last else None}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.leave()
        usage = {"completion_tokens": asked["max_tokens"], "prompt_tokens_details": {"cached_tokens": 4}}
        self.wfile.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
        return None


@contextmanager
def fake_engine() -> Iterator[FakeEngine]:
    """Started, and ended with the block."""
    with FakeEngine() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def with_values(page: str, **changes: float) -> str:
    """``page`` with other values: the name after its last colon -> the value, for every line that begins so."""
    lines = []
    for line in page.splitlines():
        name = line.split("{")[0].split(" ")[0].rpartition(":")[2]
        lines.append(
            f"{line.rpartition(' ')[0]} {changes[name]}" if not line.startswith("#") and name in changes else line
        )
    return "\n".join(lines) + "\n"
