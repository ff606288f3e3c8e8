"""Ollama, which qtool does not run: its server's variables are those that https://docs.ollama.com/faq documents. It is
llama.cpp inside, so its memory is planned as llama.cpp's."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from qtool.evaluate.engines import llama_cpp
from qtool.evaluate.engines.facts import EngineFacts, Launch, Serving


def _launch(serving: Serving) -> Launch:
    from qtool.convert.formats.gguf.modelfile import MODELFILE  # it brings torch

    told = {
        "OLLAMA_HOST": f"{serving.host}:{serving.port}",
        "OLLAMA_CONTEXT_LENGTH": str(serving.context),
        "OLLAMA_NUM_PARALLEL": str(serving.sequences),
        "OLLAMA_KV_CACHE_TYPE": serving.cache_type,
        "OLLAMA_FLASH_ATTENTION": "1",
    }
    name = (serving.name or Path(serving.place).resolve().name).lower()
    folder = serving.place if serving.file is None else os.path.dirname(serving.file) or "."
    return Launch(("ollama", "serve"), told, (("ollama", "create", name, "-f", os.path.join(folder, MODELFILE)),))


def facts_of(base: EngineFacts) -> EngineFacts:
    """llama.cpp's facts with what Ollama does otherwise."""
    kept = tuple(kind for kind in base.cache_types if kind.name in ("f16", "q8_0", "q4_0"))
    return replace(
        base, name="ollama", packages=(), install="https://ollama.com/download", cache_types=kept, offload=None,
        launch=_launch, module="", package="", program="ollama", health="/api/version", load=lambda download: [],
        processor=None,
        metrics=None, image="", command_in_image=(), bundle=(),
        untried="Ollama's variables are those that it documents; qtool has not run it",
    )  # fmt: skip


FACTS = facts_of(llama_cpp.FACTS)
assert llama_cpp.FACTS.processor is not None
FACTS = replace(FACTS, processor=facts_of(llama_cpp.FACTS.processor))
