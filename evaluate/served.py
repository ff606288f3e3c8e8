"""The `openai` engine: greedy completions from any OpenAI-compatible server (llama-server, vLLM, SGLang, Ollama)."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qtool import QtoolError

TIMEOUT = 600.0  # seconds without a byte from the server


def generate(
    base_url: str,
    model: str,
    prompts: Sequence[str | list[int]],
    *,
    max_new_tokens: int,
    concurrency: int,
    finished: Callable[[str], bool],
    on_text: Callable[[int, str], None],
    api_key: str | None = None,
) -> None:
    """Greedy continuations of ``prompts`` (text, or token ids where the server takes them), ``concurrency`` at a time:
    ``on_text(index, text)`` as each is done. ``base_url`` ends before ``/completions``, as in OpenAI's own clients.

    Raises QtoolError (exit 3) saying what the server answered.
    """

    def one(index: int) -> tuple[int, str]:
        request = {"model": model, "prompt": prompts[index], "max_tokens": max_new_tokens, "temperature": 0}
        text = ""
        for piece in _stream(f"{base_url.rstrip('/')}/completions", request, api_key):
            text += piece
            if finished(text):
                break
        return index, text

    with ThreadPoolExecutor(max_workers=concurrency) as pool:
        for index, text in pool.map(one, range(len(prompts))):
            on_text(index, text)


def top_logprobs(base_url: str, ids: list[int], count: int) -> dict[int, float]:
    """llama-server only: log-probabilities (nats) of the ``count`` likeliest tokens after ``ids``."""
    # cache_prompt: consecutive prefixes of one window cost one token each
    request = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": count, "cache_prompt": True}
    with _open(f"{base_url.rstrip('/')}/completions", request, None) as answer:
        found: dict[str, Any] = json.load(answer)
    first = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {entry["id"]: entry["logprob"] for entry in first}


def tokenize(base_url: str, text: str) -> list[int]:
    """llama-server only: token ids of ``text``, special tokens recognized, none added."""
    url = f"{base_url.rstrip('/').removesuffix('/v1')}/tokenize"
    with _open(url, {"content": text, "add_special": False, "parse_special": True}, None) as answer:
        ids: list[int] = json.load(answer)["tokens"]
    return ids


def _stream(url: str, request: dict[str, Any], api_key: str | None) -> Iterator[str]:
    """Text pieces of a streamed completion (server-sent events)."""
    with _open(url, request | {"stream": True}, api_key) as answer:
        for line in answer:
            data = line.decode().strip()
            if not data.startswith("data:") or data == "data: [DONE]":
                continue
            event = json.loads(data.removeprefix("data:"))
            if "error" in event:
                raise QtoolError(f"{url}: {event['error']}", exit_code=3)
            if event.get("choices"):
                yield event["choices"][0].get("text") or ""


def _open(url: str, request: dict[str, Any], api_key: str | None) -> Any:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    body = json.dumps(request).encode()
    try:
        return urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        said = error.read(500).decode(errors="replace")
        raise QtoolError(f"{url}: the server answered {error.code}: {said}", exit_code=3) from error
    except (urllib.error.URLError, OSError) as error:
        raise QtoolError(f"{url}: no answer ({error}). Is the server running?", exit_code=3) from error
