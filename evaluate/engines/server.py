"""A model behind an OpenAI-compatible server (vLLM, SGLang, llama-server, Ollama): streamed, in parallel, timed.

API: https://platform.openai.com/docs/api-reference (completions, chat, models), as those servers implement it.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from qtool import QtoolError
from qtool.evaluate.engines import machine
from qtool.evaluate.engines.engine import Batch, Completion, Decoding, OutOfMemory, Reading, Request, TooLong

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT, TIMED_TIMEOUT = 600.0, 1800.0  # seconds without a byte from the server
RETRIES = 4  # after the first attempt; waits of 0.5, 1, 2, 4 s unless the server names one
RETRY_WAIT = 0.5
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
# A token comes in one piece, its character sometimes in several; a server that sends more heeds no limit.
MOST_PIECES, _MORE_PIECES = 4, 256
_LONGEST_LINE = 2**24  # bytes of one event
_LARGEST = 2**28  # bytes of one answer
KEY_VARIABLE = "OPENAI_API_KEY"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Broken(Exception):
    """The connection broke or the server is busy: worth another attempt. ``wait``: seconds the server asked for."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class ServedModel:
    """``model`` at ``base_url``, which ends before ``/completions`` as in OpenAI's own clients. ``api_key`` goes into
    the Authorization header and nowhere else. ``tokenizer`` turns a prompt into token ids for servers that take them;
    ``options`` are what this server must be told beside a temperature above 0. ``inside``: it runs in this process, so
    that its memory is this process's."""

    base_url: str
    model: str
    name: str = "openai"
    version: str = ""
    dtype: str = "as served"
    device: str = "server"
    api_key: str | None = field(default=None, repr=False)
    tokenizer: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    inside: bool = False

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[Completion]:
        """``decoding.batch_size`` requests at a time. A request with messages goes to ``/chat/completions``. Raises
        QtoolError (exit 3) saying what the server answered; what came before is the caller's."""
        waiting = iter([index for index in range(len(requests)) if index not in done])
        with ThreadPoolExecutor(max_workers=decoding.batch_size) as pool:
            running: set[Future[Completion]] = set()
            try:
                while True:
                    while len(running) < decoding.batch_size and (index := next(waiting, None)) is not None:
                        running.add(pool.submit(self._one, index, requests[index], decoding))
                    if not running:
                        return
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        yield future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, index: int, request: Request, decoding: Decoding) -> Completion:
        body: dict[str, Any] = {"model": self.model, "max_tokens": decoding.max_new_tokens, "stream": True}
        body |= {"temperature": decoding.temperature}
        if decoding.temperature > 0:
            body |= {"top_p": decoding.top_p, "seed": request.seed} | self.options
        if request.messages:
            body["messages"], path = list(request.messages), "chat/completions"
        else:
            body["prompt"], path = request.prompt, "completions"
            if self.tokenizer is not None:
                body["prompt"] = self.tokenizer(request.prompt, add_special_tokens=False).input_ids
        url = f"{self.base_url.rstrip('/')}/{path}"
        for attempt in range(RETRIES + 1):
            text = ""
            try:
                for number, piece in enumerate(_stream(url, body, self.api_key)):
                    text += piece
                    if number > MOST_PIECES * decoding.max_new_tokens + _MORE_PIECES:
                        most = f"max_tokens, {decoding.max_new_tokens}"
                        raise QtoolError(f"{url}: the server goes on beyond {most}; it seems not to know it.", 3)
                    if request.finished(text):
                        break
                # halves of a character come as two pieces from servers that cut UTF-16
                return index, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            except Broken as error:
                if attempt == RETRIES:
                    raise QtoolError(f"{url}: {error}, {RETRIES + 1} times. Is the server running?", 3) from error
                time.sleep(error.wait if error.wait is not None else RETRY_WAIT * 2**attempt)
        raise AssertionError("unreachable")

    def time(self, batch: Batch) -> Reading:
        """All requests at once, streamed. Raises OutOfMemory, QtoolError (exit 3)."""
        if self.inside:
            machine.reset_resident_peak()
        started = time.perf_counter()
        with ThreadPoolExecutor(len(batch.prompts)) as pool:
            answers = list(pool.map(lambda ids: self.stamps(ids, batch.tokens), batch.prompts))
        wall = time.perf_counter() - started
        steps = tuple((times[-1] - times[0]) / (made - 1) for times, made, _ in answers if made > 1)
        cached = [tokens for _, _, tokens in answers if tokens is not None]
        return Reading(
            tuple(times[0] for times, _, _ in answers), steps, wall, sum(made for _, made, _ in answers),
            sum(cached) / (len(batch.prompts[0]) * len(cached)) if cached else None,
            {"resident": machine.resident_peak() if self.inside else None},
        )  # fmt: skip

    def stamps(
        self, ids: Sequence[int], tokens: int, reuse: bool = False, timeout: float = TIMED_TIMEOUT
    ) -> tuple[list[float], int, int | None]:
        """Seconds from a streamed request for exactly ``tokens`` tokens to each piece of its answer, tokens made, and
        tokens of the prompt that came from a cache (None: not said). ``reuse``: a server that can be told whether to
        look into its cache may; ``timeout``: seconds without a byte. Raises OutOfMemory, QtoolError (exit 3)."""
        url = f"{self.base_url.rstrip('/')}/completions"
        body = {
            "model": self.model, "prompt": list(ids), "max_tokens": tokens, "temperature": 0, "stream": True,
            "ignore_eos": True, "cache_prompt": reuse, "stream_options": {"include_usage": True},
        }  # fmt: skip
        started = time.perf_counter()
        times: list[float] = []
        usage: dict[str, Any] = {}
        ended = False
        try:
            with opener(url).open(_request(url, body, self.api_key), timeout=timeout) as answer:
                for line in iter(lambda: answer.readline(_LONGEST_LINE), b""):
                    data = line.decode().strip().removeprefix("data:").strip()
                    ended = ended or data == "[DONE]"
                    if not line.startswith(b"data:") or data == "[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise _refusal(url, hide(json.dumps(event["error"]), self.api_key))
                    usage = event.get("usage") or usage
                    for choice in event.get("choices") or []:  # a server may merge tokens into one
                        times.append(time.perf_counter() - started)
                        ended = ended or choice.get("finish_reason") is not None
            details = usage.get("prompt_tokens_details") or {}
            made, cached = int(usage.get("completion_tokens") or len(times)), details.get("cached_tokens")
        except urllib.error.HTTPError as error:
            said = hide(error.read(500).decode(errors="replace"), self.api_key)
            if error.code == 404 and not self.base_url.rstrip("/").endswith("/v1"):
                said += " Does the address end in /v1?"
            raise _refusal(url, said.strip() or f"answered {error.code}") from error
        except OSError as error:
            raise QtoolError(f"{url}: cannot be reached ({error}). Is the server running?", exit_code=3) from error
        except (http.client.HTTPException, ValueError, TypeError, AttributeError) as error:
            said = hide(repr(error), self.api_key)
            raise QtoolError(f"{url}: answered what no OpenAI-compatible server does ({said}).", 3) from error
        if not times or not ended:
            raise QtoolError(f"{url}: " + ("the answer broke off." if times else "answered without a token."), 3)
        return times, made, cached

    def prepare(self, windows: Tensor) -> None:
        """Nothing."""

    def logits(self, window: Tensor) -> None:
        """Servers give a few logits at most."""
        return None


def _refusal(url: str, said: str) -> Exception:
    lowered = said.lower()
    if "out of memory" in lowered:
        return OutOfMemory(said)
    if "context" in lowered and any(word in lowered for word in ("exceed", "size", "length", "maximum")):
        return TooLong(said)
    return QtoolError(f"{url}: {said}", exit_code=3)


def top_logprobs(base_url: str, ids: list[int], count: int, answer: int | None = None) -> dict[int, float]:
    """llama-server only: log-probabilities (nats) of the ``count`` likeliest tokens after ``ids``. ``answer``: the
    token that it is made to take: of one that ends the answer, or is half a letter, it tells nothing."""
    # cache_prompt: consecutive prefixes of one window cost one token each
    request = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": count, "cache_prompt": True}
    biased = {} if answer is None else {"logit_bias": [[answer, 1e4]]}  # log-probabilities are those before it
    said = ask(f"{base_url.rstrip('/')}/completions", request | biased)
    first = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {entry["id"]: entry["logprob"] for entry in first}


def tokenize(base_url: str, text: str) -> list[int]:
    """llama-server only: token ids of ``text``, special tokens recognized, none added."""
    url = f"{base_url.rstrip('/').removesuffix('/v1')}/tokenize"
    ids: list[int] = ask(url, {"content": text, "add_special": False, "parse_special": True})["tokens"]
    return ids


def ask(url: str, request: dict[str, Any] | None = None, timeout: float = TIMEOUT) -> Any:
    """The JSON that a server without a key answers. Raises QtoolError (exit 3) for none."""
    try:
        return json.loads(read(url, request, timeout))
    except (ValueError, RecursionError) as error:
        raise QtoolError(f"{url}: answers something else than JSON ({str(error)[:200]}).", exit_code=3) from error


def read(url: str, request: dict[str, Any] | None = None, timeout: float = TIMEOUT) -> str:
    """The text that a server without a key answers. Raises QtoolError (exit 3) for none."""
    try:
        with open_url(url, request, None, timeout) as answer:
            return str(answer.read(_LARGEST).decode("utf-8", "replace"))
    except (Broken, OSError, http.client.HTTPException) as error:
        raise QtoolError(f"{url}: {error}. Is the server running?", exit_code=3) from error


def _stream(url: str, request: dict[str, Any], api_key: str | None) -> Iterator[str]:
    """Text pieces of a streamed completion (server-sent events). A stream that ends without its end mark is broken:
    half an answer is no answer."""
    ended = False
    try:
        with open_url(url, request, api_key) as answer:
            for line in iter(lambda: answer.readline(_LONGEST_LINE), b""):
                data = line.decode().strip()
                if not data.startswith("data:"):
                    continue
                data = data.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise QtoolError(f"{url}: {hide(str(event['error'])[:500], api_key)}", exit_code=3)
                for choice in event.get("choices") or []:
                    ended = ended or choice.get("finish_reason") is not None
                    yield _text_of(choice)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Broken(f"the answer broke off ({type(error).__name__})") from error
    except (TypeError, AttributeError) as error:
        raise Broken("the answer holds something else than an OpenAI-compatible server's events") from error
    if not ended:
        raise Broken("the answer broke off")


def _text_of(choice: Any) -> str:
    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    if not isinstance(text, str):
        raise TypeError("text")
    return text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def opener(url: str) -> urllib.request.OpenerDirector:
    """For requests to ``url`` with a key: no redirect is followed, and no proxy asked for a server of this machine."""
    direct = [urllib.request.ProxyHandler({})] if urlsplit(url).hostname in LOOPBACK else []
    return urllib.request.build_opener(_NoRedirect, *direct)


def open_url(url: str, request: dict[str, Any] | None, api_key: str | None, timeout: float = TIMEOUT) -> Any:
    """The server's answer to GET, or to POST of ``request``, as a file. Raises Broken, and QtoolError (exit 3)."""
    try:
        return opener(url).open(_request(url, request, api_key), timeout=timeout)
    except urllib.error.HTTPError as error:
        said = hide(error.read(500).decode(errors="replace"), api_key)
        if error.code in RETRIED:
            raise Broken(f"the server answered {error.code}: {said}", _seconds(error.headers)) from error
        hint = f" Set {KEY_VARIABLE}." if error.code == 401 and not api_key else ""
        raise QtoolError(f"{url}: the server answered {error.code}: {said}.{hint}", exit_code=3) from error
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"no answer ({error})") from error


def _request(url: str, request: dict[str, Any] | None, api_key: str | None) -> urllib.request.Request:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    return urllib.request.Request(url, None if request is None else json.dumps(request).encode(), headers)


def _seconds(headers: Any) -> float | None:
    try:
        return min(60.0, max(0.0, float(headers.get("Retry-After"))))
    except (TypeError, ValueError):
        return None


def hide(text: str, api_key: str | None) -> str:
    """``text`` without the key: some servers repeat the one they refuse."""
    return text.replace(api_key, "***") if api_key else text
