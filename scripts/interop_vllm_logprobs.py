#!/usr/bin/env python3
"""Log-probabilities of small models under vLLM, and the gates of looped ones as it holds them; knows nothing of qtool.

    python interop_vllm_logprobs.py JOB.json OUT.pt

JOB.json: ``{"models": [{"label", "path", "dtype"}], "prompts": [[token id]]}``. OUT.pt: label -> ``{"logprobs": one
float32 [length - 1, vocabulary] a prompt, "gates": name -> tensor}``, or ``{"error": what vLLM says}``.
vLLM has the looped model and no class for its config.json, which comes with the models; one is made known here.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process: its errors are ours
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

KV_BYTES = 64 * 2**20


def gates_of(model: Any) -> dict[str, Any]:
    """The gates' parameters, under the names that checkpoints have."""
    found = {name: value for name, value in model.named_parameters() if "gate_projections" in name}
    return {name.replace(".gate_proj.", "."): value.detach().float().cpu() for name, value in found.items()}


def answer(model: dict[str, str], prompts: list[list[int]]) -> dict[str, Any]:
    """Load one model and ask it how likely every token of the prompts was."""
    import torch
    from vllm import LLM, SamplingParams

    vocabulary = json.loads(Path(model["path"], "config.json").read_text(encoding="utf-8"))["vocab_size"]
    llm = LLM(
        model=model["path"], dtype=model["dtype"], max_model_len=256, seed=0, enforce_eager=True, max_num_seqs=4,
        kv_cache_memory_bytes=KV_BYTES, distributed_executor_backend="uni", disable_log_stats=True,
        skip_tokenizer_init=True, max_logprobs=vocabulary, enable_prefix_caching=False,
    )  # fmt: skip
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=vocabulary, detokenize=False)
    made = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    rows = [[[step[token].logprob for token in range(vocabulary)] for step in one.prompt_logprobs[1:]] for one in made]
    return {"logprobs": [torch.tensor(each) for each in rows], "gates": llm.apply_model(gates_of)[0]}


def main() -> int:
    """Ask every model of the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    job, out = json.loads(options.job.read_text(encoding="utf-8")), options.out
    import torch
    from transformers import AutoConfig, LlamaConfig
    from vllm.distributed import cleanup_dist_env_and_memory

    kind = type("IQuestLoopCoderConfig", (LlamaConfig,), {"model_type": "iquestloopcoder"})
    AutoConfig.register("iquestloopcoder", kind)
    found: dict[str, Any] = {}
    for model in job["models"]:
        try:
            found[model["label"]] = answer(model, job["prompts"])
        except Exception as error:  # whatever vLLM raises is its answer
            found[model["label"]] = {"error": f"{type(error).__name__}: {error}"}
        torch.save(found, out)
        gc.collect()
        cleanup_dist_env_and_memory()
    return 0


if __name__ == "__main__":
    sys.exit(main())
