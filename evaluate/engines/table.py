"""The engines that qtool knows. To add one: its module, and its row here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qtool import QtoolError
from qtool.evaluate.engines import llama_cpp, ollama, openai, reference, sglang, transformers, vllm
from qtool.evaluate.engines.engine import Engine
from qtool.evaluate.engines.facts import EngineFacts

if TYPE_CHECKING:
    from qtool.evaluate.engines.probe import Probe

ENGINES: dict[str, Engine] = {
    module.FACTS.name: module.ENGINE for module in (reference, transformers, llama_cpp, vllm, openai)
}

# Those that cards tell how to start, in their order there; qtool does not run them all.
ON_CARDS: tuple[EngineFacts, ...] = (transformers.FACTS, vllm.FACTS, sglang.FACTS, llama_cpp.FACTS)

# Those that serve at a URL, as `qtool serve` starts them.
SERVERS: dict[str, EngineFacts] = {
    facts.name: facts for facts in (vllm.FACTS, llama_cpp.FACTS, sglang.FACTS, ollama.FACTS)
}

# Those whose servers can be proved, and how.
PROBES: dict[str, Callable[[], Probe]] = {vllm.FACTS.name: vllm.probe, llama_cpp.FACTS.name: llama_cpp.probe}


def planned() -> dict[str, EngineFacts]:
    """Those whose memory and speed can be told, and measured."""
    return {name: engine.facts for name, engine in ENGINES.items() if engine.facts.cache_types}


def planned_engine(name: str) -> EngineFacts:
    """Raises QtoolError naming those that are."""
    known = planned()
    if name not in known:
        raise QtoolError(f"engine {name}: memory and speed are told of {', '.join(known)}.")
    return known[name]
