"""The `llama.cpp` engine: a .gguf file served by llama.cpp itself, in this process, on the loopback interface."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.formats.gguf.header import read_header
from qtool.evaluate.engines import openai as served
from qtool.evaluate.engines.engine import package_versions

INSTALL = "pip install 'qtool-llm[gguf]'"
PATIENCE = 30  # seconds that the server waits for the rest of a request, and at its end for whoever began one


def installed() -> bool:
    """Whether llama.cpp is here."""
    return importlib.util.find_spec("xllamacpp") is not None


@contextmanager
def serve(file: Path, context: int, slots: int = 1, repack: bool = True) -> Iterator[str]:
    """Load ``file`` and answer under the yielded base URL until the block ends. ``context``: tokens to each of
    ``slots`` requests at a time; ``repack``: copy weights into the order that this processor is fastest with. Raises
    QtoolError when llama.cpp is not installed or cannot load the file (exit 3), or cannot read its chat template."""
    try:
        import xllamacpp
    except ImportError as error:
        raise QtoolError(f"engine llama.cpp needs xllamacpp, which is not installed here. Run: {INSTALL}", 3) from error
    try:
        read_header(file)  # llama.cpp believes what a header claims
    except ValueError as error:
        raise QtoolError(f"{file}: not a whole GGUF file ({error}).") from error
    params: Any = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel = context * slots, slots
    params.cpuparams.n_threads = os.cpu_count() or 1
    params.warmup, params.verbosity = False, 0  # only errors are said
    params.no_extra_bufts = not repack
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.timeout_read = params.timeout_write = PATIENCE

    def start() -> Any:
        server = xllamacpp.Server(params)
        # It listens before its loop runs, and told to end in between it would wait for ever: the loop answers this.
        served.ask(f"{server.listening_address}/slots")
        return server

    try:
        with ThreadPoolExecutor(max_workers=1) as starter:  # where no Ctrl-C can come in between
            server = starter.submit(start).result()
    except RuntimeError as error:
        params.chat_template = "chatml"  # of the file's own it renders a sample before it answers anything
        with suppress(RuntimeError):
            start()
            raise QtoolError(
                f"{file}: llama.cpp does not serve it: it cannot read the model's chat template. Write that without "
                "what llama.cpp's own Jinja lacks (chat_template.jinja of the source), or leave it out."
            ) from error
        raise QtoolError(f"{file}: llama.cpp cannot load it ({error}).", exit_code=3) from error
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server


@contextmanager
def open_engine(file: Path, tokenizer: Any, context: int, slots: int, dtype: str) -> Iterator[served.ServedEngine]:
    """The engine for a .gguf file, fed with ``tokenizer``'s ids; ``context`` and ``slots`` as for `serve`."""
    with serve(file, context, slots) as url:
        yield served.ServedEngine(
            url, file.stem, name="llama.cpp", version=package_versions("xllamacpp"), dtype=dtype, device="cpu",
            tokenizer=tokenizer, options={"top_k": 0, "min_p": 0.0},  # its own defaults cut more than top_p does
        )  # fmt: skip
