#!/usr/bin/env python3
"""The next token's distribution after prompts of one text, under vLLM with a cache of a type; knows nothing of qtool.

    python interop_vllm_caches.py JOB.json OUT.pt

JOB.json: ``{"model", "ids", "ends", "cache", "at_once", "anew", "bytes", "kept", "attention"}``; a prompt is
``ids[:end]``, taken up ``at_once`` tokens at a time, ``anew`` or with what an earlier one left in the cache of so many
``bytes``; ``attention``: vLLM's backend, "" for its own choice. OUT.pt: float32 ``[ends, vocabulary]``,
log-probabilities of the ``kept`` likeliest, NaN for the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process: its errors are ours
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def answer(job: dict[str, Any]) -> Any:
    """Load the model, ask every prompt, the shortest first."""
    import torch
    from vllm import LLM, SamplingParams

    vocabulary = json.loads(Path(job["model"], "config.json").read_text(encoding="utf-8"))["vocab_size"]
    attention = {"attention_backend": job["attention"]} if job["attention"] else {}
    llm = LLM(
        model=job["model"], max_model_len=max(job["ends"]) + 8, seed=0, enforce_eager=True, max_num_seqs=1,
        kv_cache_dtype=job["cache"], max_num_batched_tokens=job["at_once"], enable_chunked_prefill=True,
        enable_prefix_caching=not job["anew"], kv_cache_memory_bytes=job["bytes"], disable_log_stats=True,
        distributed_executor_backend="uni", skip_tokenizer_init=True, max_logprobs=job["kept"], **attention,
    )  # fmt: skip
    asked = SamplingParams(temperature=0, max_tokens=1, logprobs=job["kept"], detokenize=False)
    rows = torch.full((len(job["ends"]), vocabulary), torch.nan)
    for row, end in enumerate(job["ends"]):
        (made,) = llm.generate([{"prompt_token_ids": job["ids"][:end]}], asked, use_tqdm=False)
        step = made.outputs[0].logprobs[0]
        rows[row, list(step)] = torch.tensor([found.logprob for found in step.values()])
    return rows


def main() -> int:
    """One job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    import torch

    job = json.loads(options.job.read_text(encoding="utf-8"))
    torch.save(answer(job), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
