"""Seconds a layer and peak memory of a mixture of experts on an accelerator: random weights in the geometry of
Qwen3-30B-A3B (128 experts, 8 for a token; a small vocabulary), no download.

    python scripts/bench_experts.py [--layers 2] [--samples 128] [--length 2048] [--case NAME] [--profile] [--parts]

Calibration forward included. The first layer carries one-time costs (kernel compilation, cuBLAS handles) and is shown
apart. ``--parts``: what one factorization, search and rounding of a few experts takes by itself.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from bench_accelerator import walk_of
from safetensors.torch import save_file

from qtool.convert.models.shape import decoder_of
from qtool.quantize import descent, rounding, scaling
from qtool.quantize.chosen import Levels
from qtool.quantize.memory import peak_bytes
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.gguf import GgufMethod
from qtool.quantize.methods.gptq import GptqMethod
from qtool.quantize.methods.method import Method

AWQ, GPTQ, GGUF = AwqMethod(method="awq"), GptqMethod(method="gptq"), GgufMethod(method="gguf")
CASES: dict[str, Sequence[Method]] = {
    "Q4_K_M": [GGUF],
    "Q4_K_M, ggml's blocks": [GgufMethod(method="gguf", rounding="ggml")],
    "AWQ, rtn rounding": [AwqMethod(method="awq", rounding="rtn")],
    "GPTQ": [GPTQ],
    "AWQ + GPTQ": [AWQ, GPTQ],
    "AWQ + GPTQ + Q4_K_M": [AWQ, GPTQ, GGUF],
}
LAYERS = 48  # of the whole model


def config_of(layers: int) -> dict[str, object]:
    """config.json."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "intermediate_size": 6144, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 4096, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "max_position_embeddings": 262144, "rope_theta": 10000000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": False, "dtype": "bfloat16", "attention_bias": False,
    }  # fmt: skip


def make_checkpoint(folder: Path, layers: int) -> Path:
    """Random bf16 weights, one shard a layer, experts each alone as Qwen stores them."""
    config = config_of(layers)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in decoder_of(config).tensors().items():
        scale = 0.02 if len(shape) == 2 else 0.0
        tensor = (torch.randn(shape, device="cuda") * scale + (len(shape) == 1)).to(torch.bfloat16).cpu()
        shards.setdefault(".".join(name.split(".")[:3]), {})[name] = tensor
    for number, tensors in enumerate(shards.values()):
        save_file(tensors, folder / f"model-{number:05d}.safetensors")
    return folder


def measure(folder: Path, methods: Sequence[Method], tokens: torch.Tensor) -> dict[str, float]:
    """Walk all layers once."""
    walk = walk_of(folder, methods, tokens)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds, start = [], time.perf_counter()
    for result in walk.run():
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        del result
        start = time.perf_counter()
    shapes = {name: info.shape for name, info in walk.checkpoint.tensors.items()}
    layer = statistics.median(seconds[1:]) if len(seconds) > 1 else seconds[0]
    return {
        "first layer s": seconds[0],
        "median of the others s": layer,
        "whole model min": layer * LAYERS / 60,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
        "predicted GiB": peak_bytes(walk.decoder, shapes, methods, tokens.numel(), "cuda") / 2**30,
        "host peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def profile(folder: Path, methods: Sequence[Method], tokens: torch.Tensor) -> None:
    """Where one warm layer's time goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    results = walk_of(folder, methods, tokens).run()
    next(results)
    with trace(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        next(results)
        torch.cuda.synchronize()
    for key in ("self_cuda_time_total", "self_cpu_time_total"):
        print(found.key_averages().table(sort_by=key, row_limit=22, max_name_column_width=60))


def time_parts(out: int, columns: int) -> None:
    """Each step on as many experts as are worked on at once."""
    number = scaling.AT_ONCE
    x = torch.randn(number, 3000, columns, device="cuda")
    gram, weight, mean = x.mT @ x, torch.randn(number, out, columns, device="cuda"), x.abs().mean(1)
    del x
    levels, spec = Levels.of_grid(GPTQ.spec), AWQ.spec
    factor = rounding.factorize(gram, 0.1)
    begun = descent.begin(weight, factor, levels)
    with rounding.damped(gram, factor):
        damped = gram.clone()
    steps: dict[str, Callable[[], object]] = {
        "factorize, one by one": lambda: rounding.factorize(gram, 0.1),
        "Cholesky alone, batched": lambda: torch.linalg.cholesky_ex(damped),
        "begin": lambda: descent.begin(weight, factor, levels),
        "descend": lambda: descent.descend(weight, begun, gram, levels),
        "one scale": lambda: scaling.search_scale([scaling.Weighed(weight, gram)], mean.mean(0), spec),
        "own scales": lambda: scaling.search_own_scales(scaling.Weighed(weight, gram), mean, spec),
    }
    for name, step in steps.items():
        step()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        print(f"{number} x [{out}, {columns}] {name}: {time.perf_counter() - start:.3f} s", flush=True)


def main() -> None:
    """Print one JSON line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--case", action="append", choices=CASES, help="only this case (repeatable)")
    options = parser.parse_args()
    print(torch.__version__, torch.cuda.get_device_name(), flush=True)
    if options.parts:
        time_parts(1536, 2048)
        time_parts(2048, 768)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), options.layers)
        tokens = torch.randint(0, 4096, (options.samples, options.length))
        for name in options.case or ["AWQ + GPTQ", "AWQ + GPTQ + Q4_K_M"]:
            if options.profile:
                print(name)
                profile(Path(folder), CASES[name], tokens)
            else:
                figures = {key: round(value, 3) for key, value in measure(Path(folder), CASES[name], tokens).items()}
                print(json.dumps({"case": name} | figures), flush=True)


if __name__ == "__main__":
    main()
