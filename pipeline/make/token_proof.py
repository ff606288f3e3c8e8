"""Whether the runtime that reads a file splits text as the model's tokenizer does: asked of llama.cpp itself."""

from __future__ import annotations

from qtool import QtoolError
from qtool.convert.formats.format import TokenQuestion
from qtool.evaluate.engines.llama_cpp import FACTS, installed
from qtool.evaluate.engines.token_proof import prove_tokens


def prove(question: TokenQuestion | None) -> str:
    """What is to be said of the file's token ids; empty where nothing is to be asked. Raises QtoolError showing the
    first text that llama.cpp splits otherwise, or that it does not load the file."""
    if question is None:
        return ""
    if not installed():
        return f"token ids: not compared with llama.cpp's, which is not installed here. Run: {FACTS.install}"
    proof = prove_tokens(question.path, question.tokenizer, question.beyond, question.prompts)
    if proof.fatal is not None:
        raise QtoolError(f"{question.path}: llama.cpp's token ids differ from the tokenizer's: {proof.fatal}")
    if proof.limits:
        shown = "; ".join(f"{limit.token!r} ({limit.habit}), as in {limit}" for limit in proof.limits[:3])
        return (
            f"token ids: as llama.cpp's on code, white space, unicode and the model's own prompts; beside "
            f"{len(proof.limits)} of {proof.tokens} added tokens they differ, for llama.cpp finds those by other "
            f"rules: {shown}"
        )
    return f"token ids: equal to llama.cpp's on code, white space, unicode and {proof.tokens} added tokens"
