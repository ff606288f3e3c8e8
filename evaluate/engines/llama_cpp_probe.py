"""llama-server under proof. Source: llama.cpp tools/server/README.md, run with xllamacpp (scripts/check_serving.py)."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.evaluate.engines.probe import SECONDS, Best, Cache, Conversation, Probe, expected
from qtool.evaluate.engines.server import ask, tokenize, top_logprobs


def forced(url: str, model: str, ids: Sequence[int], count: int) -> list[Best]:
    """It gives no log-probabilities of a prompt: one request for each token, of which the prefix is cached."""
    with expected(f"{url}/v1/completions"):
        (letter, *_) = tokenize(f"{url}/v1", "a")
        return [top_logprobs(f"{url}/v1", list(ids[:end]), count, letter) for end in range(1, len(ids))]


def rendered(url: str, model: str, conversation: Conversation) -> str:
    """`/apply-template`."""
    body = {"messages": list(conversation.messages)}
    body |= {"tools": list(conversation.tools)} if conversation.tools else {}
    answer = ask(f"{url}/apply-template", body, SECONDS)
    with expected(f"{url}/apply-template"):
        return str(answer["prompt"])


def cache(url: str) -> Cache:
    """`/props`: slots, each with cells of its own."""
    answer = ask(f"{url}/props", timeout=SECONDS)
    with expected(f"{url}/props"):
        slots, cells = int(answer["total_slots"]), int(answer["default_generation_settings"]["n_ctx"])
    return Cache(None, cells, slots * cells)


def version(url: str, lines: Sequence[str]) -> str:
    """As its log says it: `xllamacpp 2026.10`, else llama.cpp's build."""
    for line in lines:
        if line.startswith("xllamacpp "):
            return " ".join(line.split()[:2])
    answer = ask(f"{url}/props", timeout=SECONDS)
    with expected(f"{url}/props"):
        return f"llama.cpp {answer.get('build_info') or 'unknown'}"


def kernels(lines: Sequence[str]) -> list[str]:
    """What its log says of the processor's instructions and of cards."""
    said = next((line.partition("system_info:")[2] for line in lines if "system_info:" in line), "")
    parts = [part.strip() for part in said.split("|")]
    return [part.removesuffix(" = 1") for part in parts if part.endswith("= 1") or part.startswith("CUDA")]


PROBE = Probe(
    forced, rendered, cache, version, kernels, cached="llamacpp:prompt_tokens_cached_total",
    steps="llamacpp:n_decode_total",
    rounded=256,  # Q8_K, which rows of K-quants are multiplied with on a processor (ggml-cpu/quants.c)
)  # fmt: skip
