"""What a cache's type, and the tokens that are taken up at once, change in llama.cpp and in vLLM: KL by position.

    python scripts/check_caches.py --tokenizer ./My-Model --gguf source.gguf --gguf q4_k_m.gguf [--every 16]
    python scripts/check_caches.py --tokenizer ./My-Model --vllm /path/to/vllm/bin/python [--cache auto --cache fp8]

The text is `heldout-code`. Asked are the ``--kept`` likeliest next tokens after every ``--every`` tokens; KL is to the
first file (or the model) with the first cache, over the tokens that both name and one bucket for the rest, so never
more than the whole KL. Intervals resample blocks of 128 positions. Then, for each cache, eight prompts of up to
``--prompt`` tokens are taken up anew 64, 256 and 1,024 tokens at a time (llama.cpp: n_ubatch; vLLM:
max_num_batched_tokens) and held against the last of these. vLLM runs in an environment of its own; its memory is one
model and ``--gib`` of cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.convert.text.long_text import long_text
from qtool.convert.text.source import TextSource
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.evaluate.buckets import BLOCK, bucket_name, buckets_of
from qtool.evaluate.engines import server
from qtool.evaluate.statistics import bootstrap_mean

HERE = Path(__file__).parent
AT_ONCE = (1024, 256, 64)
PROMPTS = 8  # of the second question


@contextmanager
def llama_server(file: Path, context: int, cache: str, at_once: int) -> Iterator[str]:
    """llama.cpp with keys and values of a type, on one slot."""
    import xllamacpp

    params: Any = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), context, 1
    params.n_batch = params.n_ubatch = at_once
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup, params.verbosity = False, 0
    params.hostnames, params.port = ["127.0.0.1"], 0
    running = xllamacpp.Server(params)
    server.ask(f"{running.listening_address}/slots")
    try:
        yield f"{running.listening_address}/v1"
    finally:
        del running


def by_llama_cpp(
    file: Path, ids: list[int], ends: Sequence[int], size: tuple[int, int], cache: str, at_once: int, anew: bool
) -> Tensor:
    """Log-probabilities float32 ``[ends, vocabulary]``, NaN for all but the likeliest. ``size``: the vocabulary, and
    how many are asked for; ``anew``: nothing of an earlier prompt is reused."""
    rows = torch.full((len(ends), size[0]), torch.nan)
    with llama_server(file, max(ends) + 8, cache, at_once) as url:
        for row, end in enumerate(ends):
            if anew:  # one that shares no beginning
                server.top_logprobs(url, [ids[end], ids[0]], 1)
            found = server.top_logprobs(url, ids[:end], size[1])
            rows[row, list(found)] = torch.tensor(list(found.values()))
    return rows


def by_vllm(
    python: Path, model: Path, ids: list[int], ends: Sequence[int], kept: int, cache: str, at_once: int, anew: bool,
    gib: float, attention: str,
) -> Tensor:  # fmt: skip
    """As `by_llama_cpp`, by the vLLM of another environment."""
    with tempfile.TemporaryDirectory(prefix="qtool-") as folder:
        job, out = Path(folder, "job.json"), Path(folder, "out.pt")
        job.write_text(
            json.dumps({
                "model": str(model), "ids": ids, "ends": list(ends), "cache": cache, "at_once": at_once, "anew": anew,
                "bytes": int(gib * 2**30), "kept": kept, "attention": attention,
            })
        )  # fmt: skip
        command = [str(python), str(HERE / "interop_vllm_caches.py"), str(job), str(out)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found: Tensor = torch.load(out)
    return found


def divergence(p_log: Tensor, q_log: Tensor) -> list[float]:
    """KL at each position, nats: of the tokens that both name, and of the rest."""
    both = ~(p_log.isnan() | q_log.isnan())
    p, q = (torch.where(both, log.double(), -torch.inf).exp() for log in (p_log, q_log))
    listed = torch.where(both, p * (p_log.double() - q_log.double()), 0.0).sum(-1)
    p_rest, q_rest = ((1 - part.sum(-1)).clamp_min(1e-9) for part in (p, q))
    kl: list[float] = (listed + p_rest * (p_rest / q_rest).log()).clamp_min(0).tolist()
    return kl


def row_of(name: str, cache: str, kl: Sequence[float], ends: Sequence[int], length: int) -> str:
    """By bucket, with intervals over blocks of positions."""
    cells = []
    for start, end in buckets_of(length):
        blocks: dict[int, list[float]] = {}
        for at, value in zip(ends, kl, strict=True):
            if start < at <= end:
                blocks.setdefault((at - 1) // BLOCK, []).append(value)
        mean = bootstrap_mean([sum(values) / len(values) for values in blocks.values()])
        cells.append(f"{mean.estimate:.2e} [{mean.low:.2e}, {mean.high:.2e}]")
    return f"| {name} | {cache} | {' | '.join(cells)} |"


def main() -> None:
    """Two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="the model's folder")
    parser.add_argument("--gguf", type=Path, action="append", default=[])
    parser.add_argument("--vllm", type=Path, help="a Python that has vLLM; it runs the model of --tokenizer")
    parser.add_argument("--cache", action="append", default=[])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--every", type=int, default=16)
    parser.add_argument("--kept", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--gib", type=float, default=1.0, help="vLLM's cache")
    parser.add_argument(
        "--attention", default="", help="vLLM's backend of attention, as TRITON_ATTN (default: its own choice)"
    )
    options = parser.parse_args()
    ids = _text(options.tokenizer, options.length)
    size = (json.loads((options.tokenizer / "config.json").read_text())["vocab_size"], options.kept)
    ends = range(options.every, options.length, options.every)
    models: list[Path] = [options.tokenizer] if options.vllm else options.gguf
    caches = options.cache or (["auto", "fp8"] if options.vllm else ["f16", "bf16", "q8_0", "q4_0"])

    def asked(model: Path, cache: str, ends: Sequence[int], at_once: int, anew: bool) -> Tensor:
        if options.vllm:
            return by_vllm(options.vllm, model, ids, ends, options.kept, cache, at_once, anew, options.gib,
                           options.attention)  # fmt: skip
        return by_llama_cpp(model, ids, ends, size, cache, at_once, anew)

    names = [bucket_name(*bucket) for bucket in buckets_of(options.length)]
    print(f"| model | cache | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}", flush=True)
    first: Tensor | None = None
    for model in models:
        for cache in caches:
            found = asked(model, cache, ends, 512, False)
            first = found if first is None else first
            print(row_of(model.name, cache, divergence(first, found), ends, options.length), flush=True)
    some = range(options.prompt // PROMPTS, options.prompt + 1, options.prompt // PROMPTS)
    print(f"\n| cache | at once | KL to {AT_ONCE[0]} at once, largest of {PROMPTS} prompts |\n|---|---|---|")
    for cache in caches:
        whole = asked(models[0], cache, some, AT_ONCE[0], True)
        for at_once in AT_ONCE[1:]:
            most = max(divergence(whole, asked(models[0], cache, some, at_once, True)))
            print(f"| {cache} | {at_once} | {most:.2e} |", flush=True)


def _text(tokenizer: Path, length: int) -> list[int]:
    source = TextSource(text="heldout-code", samples=1, length=length)
    found: list[int] = long_text(source, load_tokenizer(tokenizer)).tokens.tolist()
    return found


if __name__ == "__main__":
    main()
