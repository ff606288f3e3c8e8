"""Stands in for `vllm`: takes its flags, answers as its server does, from the reference; QTOOL_FAKE plants a fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = set(os.environ.get("QTOOL_FAKE", "").split(","))
BLOCK, COUNT = 128, {"requests": 0, "hits": 0}
SEEN: set[tuple[int, ...]] = set()
LOCK = threading.Lock()


class Model:
    """The artifact's own log-probabilities, tokenizer and sizes; loaded when they are first asked for."""

    def __init__(self, words: list[str]) -> None:
        self.place = Path(words[1])
        self.flags = {words[i]: words[i + 1] for i in range(2, len(words) - 1) if words[i].startswith("--")}
        self.longest = int(self.flags["--max-model-len"])
        chunk = int(self.flags["--max-num-batched-tokens"]) * (2 if "larger chunks" in FAULTS else 1)
        print(f"INFO Chunked prefill is enabled with max_num_batched_tokens={chunk}.", flush=True)
        config = json.loads((self.place / "config.json").read_text())
        row = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2
        self.blocks = int(self.flags["--kv-cache-memory-bytes"]) // (row * BLOCK)
        self.reference: Any = None
        self.tokenizer: Any = None

    def load(self) -> None:
        from qtool.convert.artifact import Artifact
        from qtool.convert.text.tokenizer import load_tokenizer
        from qtool.serve.parity import Reference

        with LOCK:
            if self.reference is None:
                self.tokenizer = load_tokenizer(self.place)
                self.reference = Reference(Artifact.open(self.place))

    def prompt_logprobs(self, ids: list[int], count: int) -> list[dict[str, Any] | None]:
        self.load()
        (rows,) = self.reference.logprobs([ids])
        if "noisy" in FAULTS:
            rows = (rows * 1.3).log_softmax(-1)
        values, tokens = rows.topk(count)
        found: list[dict[str, Any] | None] = [None]
        for position in range(len(ids) - 1):
            pairs = zip(tokens[position].tolist(), values[position].tolist(), strict=True)
            found.append({str(token): {"logprob": value} for token, value in pairs})
        return found

    def take_up(self, ids: list[int], tokens: int) -> None:
        """Count what the cache and the scheduler do."""
        with LOCK:
            held = 0
            for end in range(BLOCK, len(ids), BLOCK):
                held = end if tuple(ids[:end]) in SEEN else held
            if "no sharing" not in FAULTS:
                COUNT["hits"] += held
            SEEN.update(tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK))


class Handler(BaseHTTPRequestHandler):
    model: Model

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, body: Any, code: int = 200) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(b"", 503 if "silent" in FAULTS else 200)
        elif self.path == "/version":
            self.reply({"version": "9.9"})
        else:
            blocks = self.model.blocks - ("fewer blocks" in FAULTS)
            self.reply(
                f'vllm:cache_config_info{{block_size="{BLOCK}",num_gpu_blocks="{blocks}"}} 1.0\n'
                f'vllm:prefix_cache_hits_total{{engine="0"}} {COUNT["hits"]}.0\n'
                f"vllm:num_preemptions_total {7 if 'preempting' in FAULTS else 0}\n".encode()
            )

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        COUNT["requests"] += 1
        if "dies later" in FAULTS and COUNT["requests"] > 3:
            print("RuntimeError: Worker died with hf_abcdefghijk", flush=True)
            os._exit(9)
        if "garbage" in FAULTS:
            return self.reply(b"<html>not found</html>")
        if "other shape" in FAULTS:
            return self.reply({"choices": []})
        if self.path == "/tokenize":
            return self.reply({"tokens": self.rendered(asked)})
        self.complete(asked)

    def rendered(self, asked: dict[str, Any]) -> list[int]:
        self.model.load()
        talk = asked["messages"]
        for turn in talk:
            for call in turn.get("tool_calls", []):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        text = self.model.tokenizer.apply_chat_template(
            talk, tools=asked.get("tools") if "tools lost" not in FAULTS else None, tokenize=False,
            add_generation_prompt=asked["add_generation_prompt"],
        )  # fmt: skip
        ids: list[int] = self.model.tokenizer(text, add_special_tokens=False).input_ids
        return ids[1:] if "template" in FAULTS else ids

    def complete(self, asked: dict[str, Any]) -> None:
        ids, tokens = asked["prompt"], asked["max_tokens"]
        ids = list(ids.encode()) if isinstance(ids, str) else ids
        longest = self.model.longest * (4 if "takes all" in FAULTS else 1)
        longest -= "short" in FAULTS and "prompt_logprobs" not in asked
        if len(ids) + tokens > longest:
            return self.reply({"error": {"message": f"longer than {longest} tokens"}}, 400)
        self.model.take_up(ids, tokens)
        ends = bool(asked.get("logit_bias")) and "endless" not in FAULTS
        if asked.get("stream"):
            self.send_response(200)
            self.end_headers()
            for _ in range(tokens):
                self.wfile.write(b'data: {"choices": [{"text": "x", "finish_reason": null}]}\n\n')
            usage = {"choices": [], "usage": {"completion_tokens": tokens}}
            self.wfile.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
            self.close_connection = True
            return
        choice: dict[str, Any] = {"text": "" if ends else "x" * tokens, "finish_reason": "stop" if ends else "length"}
        if "prompt_logprobs" in asked:
            choice["prompt_logprobs"] = self.model.prompt_logprobs(ids, asked["prompt_logprobs"])
        self.reply({"choices": [choice], "usage": {"completion_tokens": 1 if ends else tokens}})


def main() -> None:
    """As `vllm serve FOLDER …`."""
    print("Using FakeLinearKernel", flush=True)
    print(f"Error: the environment holds {os.environ.get('HF_TOKEN', 'no token')}", flush=True)
    if "dies" in FAULTS:
        print(f"ValueError: no room for the cache; key {'hf_' + 'planted8315xyz'}", flush=True)
        print("\n".join(f"  frame {i}" for i in range(20)), flush=True)
        sys.exit(5)
    Handler.model = Model(sys.argv[1:])
    if child := os.environ.get("QTOOL_FAKE_CHILD"):
        process = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"])
        Path(child).write_text(str(process.pid))
    server = ThreadingHTTPServer((Handler.model.flags["--host"], int(Handler.model.flags["--port"])), Handler)
    if "never listens" in FAULTS:
        time.sleep(600)
    server.serve_forever()


if __name__ == "__main__":
    main()
