#!/usr/bin/env python3
"""Greedy answers and best log-probabilities of models under vLLM, in vLLM's environment; knows nothing of qtool.

    python interop_vllm.py JOB.json OUT.jsonl

JOB.json: ``{"models": [{"label", "path", "dtype"}], "prompts": [[token id]], "tokens": 32, "best": 5, "options": {}}``.
A line of OUT.jsonl for each model, as soon as it is done: dtype, device and kernels used, and the answers; or
``error``, what vLLM says where it refuses. Before a model is tried its label goes into OUT.jsonl.trying, so that
whoever started this can tell which model took the process down.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process: its errors are ours
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

KV_BYTES = 64 * 2**20  # of a small model's cache: enough for 32 prompts of 480 tokens


def kernels_of(model: Any) -> dict[str, int]:
    """Quantization method and kernel -> how many modules have them."""
    found: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is None or type(method).__name__ == "UnquantizedEmbeddingMethod":
            continue
        scheme = getattr(module, "scheme", None)
        kernel = getattr(method, "kernel", None) or getattr(scheme, "kernel", None)
        found[type(kernel or scheme or method).__name__] += 1
    return dict(found)


def answer(job: dict[str, Any], model: dict[str, str]) -> dict[str, Any]:
    """Load one model and let it answer every prompt."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model["path"], dtype=model["dtype"], max_model_len=job["context"], seed=0, enforce_eager=True,
        kv_cache_memory_bytes=KV_BYTES, max_num_seqs=32, distributed_executor_backend="uni", disable_log_stats=True,
        skip_tokenizer_init=True, **job["options"],
    )  # fmt: skip
    config = llm.llm_engine.vllm_config
    asked = SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=job["best"], detokenize=False)
    made = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], asked, use_tqdm=False)
    return {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "device": str(config.device_config.device_type),
        "kernels": llm.apply_model(kernels_of)[0],
        "answers": [
            {
                "tokens": list(one.outputs[0].token_ids),
                "best": [{str(t): p.logprob for t, p in step.items()} for step in one.outputs[0].logprobs or []],
            }
            for one in made
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    out = options.out
    job = json.loads(options.job.read_text(encoding="utf-8"))
    import torch
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    about = {"vllm": vllm.__version__, "torch": torch.__version__}
    if torch.cuda.is_available():
        about["card"] = torch.cuda.get_device_name()
    for model in job["models"]:
        Path(f"{out}.trying").write_text(model["label"], encoding="utf-8")
        started = time.monotonic()
        try:
            row = answer(job, model)
        except Exception as error:  # whatever vLLM raises is its answer
            row = {"error": f"{type(error).__name__}: {error}"}
        row |= model | about | {"seconds": round(time.monotonic() - started, 1)}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(model["label"], model["dtype"], row.get("error", "")[:200] or row["kernels"], row["seconds"], flush=True)
        gc.collect()
        cleanup_dist_env_and_memory()
    return 0


if __name__ == "__main__":
    sys.exit(main())
