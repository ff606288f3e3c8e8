"""SGLang's server under proof. Source: sglang/srt/entrypoints/http_server.py of 0.5.17."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qtool.evaluate.engines.probe import SECONDS, Best, Cache, Conversation, Probe, expected
from qtool.evaluate.engines.server import ask

_KERNEL = re.compile(r"\bUsing (\w+) kernel")
_SAID = re.compile(r"\b(attention_backend|quantization)='(\w[\w-]*)'")
_CHUNK = re.compile(r"\bchunked_prefill_size=(\d+)")


def forced(url: str, model: str, ids: Sequence[int], count: int) -> list[Best]:
    """`/generate`, its own way to be asked: OpenAI's gives no log-probabilities of a prompt."""
    place = f"{url}/generate"
    body = {
        "input_ids": list(ids), "sampling_params": {"max_new_tokens": 1, "temperature": 0}, "return_logprob": True,
        "logprob_start_len": 0, "top_logprobs_num": count,
    }  # fmt: skip
    answer = ask(place, body, SECONDS)
    with expected(place):
        rows = answer["meta_info"]["input_top_logprobs"][1:]  # nothing comes before the first token
        found = [{int(token): float(logprob) for logprob, token, _ in row} for row in rows]
        if len(found) != len(ids) - 1:
            raise ValueError(f"{len(found)} positions instead of {len(ids) - 1}")
    return found


def rendered(url: str, model: str, conversation: Conversation) -> list[int]:
    """`/tokenize` of a conversation."""
    body = {"model": model, "messages": list(conversation.messages)}
    body |= {"tools": list(conversation.tools)} if conversation.tools else {}
    answer = ask(f"{url}/tokenize", body, SECONDS)
    with expected(f"{url}/tokenize"):
        return [int(token) for token in answer["tokens"]]


def cache(url: str) -> Cache:
    """`/server_info`: tokens; whoever begins alike shares each of them, so it has no blocks."""
    answer = ask(f"{url}/server_info", timeout=SECONDS)
    with expected(f"{url}/server_info"):
        return Cache(None, int(answer["page_size"] or 1), int(answer["max_total_num_tokens"]))


def version(url: str, lines: Sequence[str]) -> str:
    """`sglang 0.5.17`."""
    answer = ask(f"{url}/server_info", timeout=SECONDS)
    with expected(f"{url}/server_info"):
        return f"sglang {answer['version']}"


def kernels(lines: Sequence[str]) -> list[str]:
    """What its log says of linears and attention."""
    found: dict[str, None] = {}
    for line in lines:
        found |= dict.fromkeys(_KERNEL.findall(line))
        found |= {f"{what.replace('_', ' ')} {name}": None for what, name in _SAID.findall(line) if name != "None"}
    return list(found)


def chunk(lines: Sequence[str]) -> int | None:
    """As it repeats its own arguments."""
    return next((int(found[1]) for line in lines if (found := _CHUNK.search(line))), None)


PROBE = Probe(
    forced, rendered, cache, version, kernels,
    cached="sglang:cached_tokens_total",
    preempted="sglang:num_retracted_requests_total", chunk=chunk,
)  # fmt: skip
