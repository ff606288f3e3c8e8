"""The `llama.cpp` engine: a .gguf file served by llama.cpp itself, in this process, on the loopback interface."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.evaluate import served

INSTALL = "pip install 'qtool-llm[gguf]'"


@contextmanager
def serve(file: Path, context: int, slots: int = 1) -> Iterator[str]:
    """Load ``file`` and answer under the yielded base URL until the block ends. ``context``: tokens to each of
    ``slots`` requests at a time. Raises QtoolError (exit 3) when llama.cpp is not installed or cannot load the file.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise QtoolError(f"engine llama.cpp needs xllamacpp, which is not installed here. Run: {INSTALL}", 3) from error
    params: Any = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel = context * slots, slots
    params.cpuparams.n_threads = os.cpu_count() or 1
    params.warmup = False
    params.hostnames, params.port = ["127.0.0.1"], 0
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise QtoolError(f"{file}: llama.cpp cannot load it ({error}).", exit_code=3) from error
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server


def generate(
    file: Path,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    finished: Callable[[str], bool],
    on_text: Callable[[int, str], None],
) -> None:
    """Greedy continuations of token ids, as `served.generate` gives them."""
    context = max(map(len, prompts)) + max_new_tokens
    with serve(file, context, batch_size) as url:
        served.generate(
            url, file.stem, prompts, max_new_tokens=max_new_tokens, concurrency=batch_size, finished=finished,
            on_text=on_text,
        )  # fmt: skip
