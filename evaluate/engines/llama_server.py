"""llama.cpp's own server from the package xllamacpp, for machines without the program `llama-server`.

`python -P -m qtool.evaluate.engines.llama_server` takes those of its flags that qtool plans with, and ends at a signal.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

TYPES = ("f16", "bf16", "q8_0", "q4_0")


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal comes. 1: llama.cpp cannot load the file, 3: xllamacpp is not installed."""
    asked = _parser().parse_args(arguments)
    try:
        import xllamacpp
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 3
    ended = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda *_: ended.set())
    try:
        running = xllamacpp.Server(_params(xllamacpp, asked))
    except RuntimeError as error:
        print(f"error: {asked.model}: llama.cpp cannot serve it: {error}", file=sys.stderr, flush=True)
        return 1
    print(f"system_info: {' '.join(xllamacpp.get_system_info().split())}", file=sys.stderr)
    print(f"xllamacpp {xllamacpp.__version__} at {running.listening_address}", file=sys.stderr, flush=True)
    ended.wait()
    os._exit(0)  # its own end waits for requests that nobody reads any more


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llama_server", description="llama.cpp's server, from xllamacpp.")
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-c", "--ctx-size", type=int, default=0)
    parser.add_argument("-np", "--parallel", type=int, default=1)
    parser.add_argument("-ngl", "--gpu-layers", type=int, default=99)
    parser.add_argument("-fa", "--flash-attn", choices=("on", "off", "auto"), default="auto")
    parser.add_argument("-b", "--batch-size", type=int, default=2048)
    parser.add_argument("-ub", "--ubatch-size", type=int, default=512)
    parser.add_argument("-ctk", "--cache-type-k", choices=TYPES, default="f16")
    parser.add_argument("-ctv", "--cache-type-v", choices=TYPES, default="f16")
    parser.add_argument("--no-cache-prompt", action="store_true")
    parser.add_argument("--alias", default="")
    parser.add_argument("--metrics", action="store_true")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    return parser


def _params(xllamacpp: Any, asked: argparse.Namespace) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(asked.model)
    params.n_ctx, params.n_parallel = asked.ctx_size, asked.parallel
    params.n_batch, params.n_ubatch = asked.batch_size, asked.ubatch_size
    params.n_gpu_layers = asked.gpu_layers
    flash = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}[asked.flash_attn]
    params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
    for side, kind in (("k", asked.cache_type_k), ("v", asked.cache_type_v)):
        setattr(params, f"cache_type_{side}", getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kind.upper()}"))
    params.cache_prompt = not asked.no_cache_prompt
    params.model_alias = {asked.alias} if asked.alias else set()
    params.endpoint_metrics = asked.metrics
    params.hostnames, params.port = [asked.host], asked.port
    params.cpuparams.n_threads = os.cpu_count() or 1
    return params


if __name__ == "__main__":
    sys.exit(main())
