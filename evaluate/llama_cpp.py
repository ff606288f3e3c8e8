"""The `llama.cpp` engine: a .gguf file served by llama.cpp itself, in this process, on the loopback interface."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.evaluate import served
from qtool.evaluate.engines import package_versions

INSTALL = "pip install 'qtool-llm[gguf]'"
PATIENCE = 30  # seconds that the server waits for the rest of a request, and at its end for whoever began one


def installed() -> bool:
    """Whether llama.cpp is here."""
    return importlib.util.find_spec("xllamacpp") is not None


@contextmanager
def serve(file: Path, context: int, slots: int = 1, repack: bool = True) -> Iterator[str]:
    """Load ``file`` and answer under the yielded base URL until the block ends. ``context``: tokens to each of
    ``slots`` requests at a time; ``repack``: copy weights into the order that this processor is fastest with. Raises
    QtoolError (exit 3) when llama.cpp is not installed or cannot load the file."""
    try:
        import xllamacpp
    except ImportError as error:
        raise QtoolError(f"engine llama.cpp needs xllamacpp, which is not installed here. Run: {INSTALL}", 3) from error
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
        raise QtoolError(f"{file}: llama.cpp cannot load it ({error}).", exit_code=3) from error
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server


TOKEN_CORPUS = (
    "def f(x, y=1):\n\treturn x**2 + y  # square\n\n\nclass A(B):\n    pass\n",
    "  leading,   inner and trailing spaces   \n\n\n\t\t\tmixed \t \n \r\n end",
    "for (int i = 0; i < 1000000; ++i) { a[i] ^= 0xDEADBEEF >> 3; } // 3.14159e-10 1234567890",
    "I've they'RE we'Ll don't 'quoted' \"double\" `back` $HOME && || != == => -> ::",
    "na\u00efve caf\u00e9 \u03a9\u2248\u00e7 \u4f60\u597d\u4e16\u754c "
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f680 \U0001f9d1\u200d\U0001f4bb \u00a0 \u3000 end",
    "snake_case camelCase SCREAMING_CASE kebab-case x1y2z3 http://example.org/a?b=c&d=%20#e",
)  # NFC text: llama.cpp never composes marks, where some tokenizers do


def token_difference(file: Path, tokenizer: Any, without: Collection[str] = ()) -> str | None:
    """The first text that llama.cpp, reading ``file``, splits into other token ids than ``tokenizer`` does; None when
    all agree. Special tokens but those in ``without`` are tried one by one between words. Raises QtoolError as `serve`
    does."""
    special = [f"a {token} b{token}c" for token in tokenizer.all_special_tokens if token not in without]
    with serve(file, 512, repack=False) as url:  # no weight is looked at: they may still be missing
        for text in (*TOKEN_CORPUS, *special):
            expected = tokenizer(text, add_special_tokens=False).input_ids
            found = served.tokenize(url, text)
            if found != expected:
                return f"{text!r}: {found} instead of {expected}"
    return None


@contextmanager
def open_engine(file: Path, tokenizer: Any, context: int, slots: int, dtype: str) -> Iterator[served.ServedEngine]:
    """The engine for a .gguf file, fed with ``tokenizer``'s ids; ``context`` and ``slots`` as for `serve`."""
    with serve(file, context, slots) as url:
        yield served.ServedEngine(
            url, file.stem, name="llama.cpp", version=package_versions("xllamacpp"), dtype=dtype, device="cpu",
            tokenizer=tokenizer, options={"top_k": 0, "min_p": 0.0},  # its own defaults cut more than top_p does
        )  # fmt: skip
