"""vLLM's server under proof. Source: vllm/entrypoints/openai, run with 0.32 (scripts/check_serving.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qtool.evaluate.engines.probe import SECONDS, Best, Cache, Conversation, Probe, complete, expected
from qtool.evaluate.engines.server import ask, read

_LABEL = re.compile(r'(\w+)="([^"]*)"')
_KERNEL = re.compile(r"\bUsing (\w+(?:Kernel|LinearMethod|Scheme)\w*)")
_CHUNK = re.compile(r"Chunked prefill is enabled with max_num_batched_tokens=(\d+)")
_METHOD = re.compile(r"quantization=([\w-]+)")
_ATTENTION = re.compile(r"Using (?:AttentionBackendEnum\.)?(\w*ATTN\w*)")


def forced(url: str, model: str, ids: Sequence[int], count: int) -> list[Best]:
    """`prompt_logprobs`: one request for the whole prompt."""
    answer = complete(url, model, ids, prompt_logprobs=count)
    with expected(f"{url}/v1/completions"):
        rows = answer["choices"][0]["prompt_logprobs"][1:]
        found = [{int(token): float(entry["logprob"]) for token, entry in row.items()} for row in rows]
        if len(found) != len(ids) - 1:
            raise ValueError(f"{len(found)} positions instead of {len(ids) - 1}")
    return found


def rendered(url: str, model: str, conversation: Conversation) -> list[int]:
    """`/tokenize` of a conversation."""
    body = {"model": model, "messages": list(conversation.messages), "add_generation_prompt": True}
    body |= {"tools": list(conversation.tools)} if conversation.tools else {}
    answer = ask(f"{url}/tokenize", body, SECONDS)
    with expected(f"{url}/tokenize"):
        return [int(token) for token in answer["tokens"]]


def cache(url: str) -> Cache:
    """`vllm:cache_config_info`, whose labels say what it holds."""
    place = f"{url}/metrics"
    lines = read(place, timeout=SECONDS).splitlines()
    with expected(place):
        said = dict(_LABEL.findall(next((x for x in lines if x.startswith("vllm:cache_config_info{")), "")))
        blocks, block = int(said["num_gpu_blocks"]), int(said["block_size"])
    return Cache(blocks, block, blocks * block)


def version(url: str, lines: Sequence[str]) -> str:
    """`vllm 0.32.0`."""
    answer = ask(f"{url}/version", timeout=SECONDS)
    with expected(f"{url}/version"):
        return f"vllm {answer['version']}"


def kernels(lines: Sequence[str]) -> list[str]:
    """Linear kernels and attention that its log names, with the quantization that it read from config.json."""
    found: dict[str, None] = {}
    for line in lines:
        found |= dict.fromkeys(_KERNEL.findall(line))
        found |= dict.fromkeys(_ATTENTION.findall(line))
        found |= {f"quantization {name}": None for name in _METHOD.findall(line) if name != "None"}
    return list(found)


def chunk(lines: Sequence[str]) -> int | None:
    """Steps that make no token are in none of its counters; the scheduler says their size."""
    return next((int(found[1]) for line in lines if (found := _CHUNK.search(line))), None)


PROBE = Probe(
    forced, rendered, cache, version, kernels,
    cached="vllm:prefix_cache_hits_total",
    preempted="vllm:num_preemptions_total", chunk=chunk,
)  # fmt: skip
