"""Seconds a layer and peak memory of the walk on an accelerator: random weights of a known geometry, no download.

    python scripts/bench_accelerator.py [--geometry 8b|40b|70b] [--layers 4] [--samples 128] [--length 2048] [--profile]
    python scripts/bench_accelerator.py --gpus 4 --case "AWQ + GPTQ + NF4 + Q4_K_M, propagated inputs"

Geometry of Llama-3.1-8B, IQuest-Coder-V1-40B or Llama-3.1-70B (a small vocabulary), bf16; calibration forward included.
The first layer carries one-time costs (kernel compilation, cuBLAS handles) and is shown apart. With --gpus a process
for each card: a layer's seconds are those of the slowest, peaks are of each card.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.multiprocessing.spawn import spawn
from transformers import LlamaConfig

from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.config_file import read_config
from qtool.convert.formats.plan import ModelShape
from qtool.convert.models.shape import decoder_of
from qtool.convert.skeleton import build_skeleton, load_config
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.gguf import GgufMethod
from qtool.quantize.methods.gptq import GptqMethod
from qtool.quantize.methods.method import Method
from qtool.quantize.methods.nf4 import Nf4Method
from qtool.quantize.ranks import Ranks, dealt_out, joined
from qtool.quantize.walk import Column, Walk

Methods = Sequence[Method]
CASES: dict[str, Methods] = {
    "AWQ, rtn rounding": [AwqMethod(method="awq", rounding="rtn")],
    "AWQ, gptq rounding, source inputs": [AwqMethod(method="awq", propagate_error=False)],
    "AWQ, gptq rounding, propagated inputs": [AwqMethod(method="awq")],
    "GPTQ, source inputs": [GptqMethod(method="gptq", propagate_error=False)],
    "GPTQ, propagated inputs": [GptqMethod(method="gptq")],
    "AWQ + GPTQ + NF4, source inputs": [
        AwqMethod(method="awq", propagate_error=False),
        GptqMethod(method="gptq", propagate_error=False),
        Nf4Method(method="nf4"),
    ],
    "AWQ + GPTQ + NF4, propagated inputs": [
        AwqMethod(method="awq"),
        GptqMethod(method="gptq"),
        Nf4Method(method="nf4"),
    ],
    "AWQ + GPTQ + Q4_K_M, propagated inputs": [
        AwqMethod(method="awq"),
        GptqMethod(method="gptq"),
        GgufMethod(method="gguf"),
    ],
    "AWQ + GPTQ + NF4 + Q4_K_M, propagated inputs": [
        AwqMethod(method="awq"),
        GptqMethod(method="gptq"),
        Nf4Method(method="nf4"),
        GgufMethod(method="gguf"),
    ],
}


# hidden, intermediate, heads
GEOMETRIES = {"8b": (4096, 14336, 32), "40b": (5120, 27648, 40), "70b": (8192, 28672, 64)}


def make_checkpoint(folder: Path, geometry: str, layers: int) -> Path:
    """Random bf16 weights, one shard a layer."""
    hidden, intermediate, heads = GEOMETRIES[geometry]
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, rope_theta=500000.0, max_position_embeddings=131072,
        tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    torch.manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in build_skeleton(config).state_dict().items()}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        if name == "lm_head.weight":
            continue
        scale = 0.02 if len(shape) == 2 else 0.0
        tensor = (torch.randn(shape, device="cuda") * scale + (len(shape) == 1)).to(torch.bfloat16).cpu()
        shards.setdefault(".".join(name.split(".")[:3]), {})[name] = tensor
    for number, tensors in enumerate(shards.values()):
        save_file(tensors, folder / f"model-{number:05d}.safetensors")
    return folder


ONE = Ranks(device=torch.device("cuda"))


def walk_of(folder: Path, methods: Methods, tokens: torch.Tensor, ranks: Ranks = ONE) -> Walk:
    """A walk over the checkpoint in ``folder``."""
    model = build_skeleton(load_config(folder))
    config, checkpoint = read_config(folder), Checkpoint.open(folder)
    decoder = decoder_of(config)
    shape = ModelShape(checkpoint.tensors, decoder, config)
    owners = dealt_out([method.cost for method in methods], ranks.number)
    columns = [
        Column(method, method.container.of_model(decoder).plan(shape), owner=owner)
        for method, owner in zip(methods, owners, strict=True)
    ]
    text = CalibrationSet(tokens, "random")
    return Walk(model, decoder, checkpoint, text, columns, ranks.device, ranks=ranks)


def measure(folder: Path, methods: Methods, tokens: torch.Tensor, ranks: Ranks) -> dict[str, Any]:
    """Walk all layers once."""
    walk = walk_of(folder, methods, tokens, ranks)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    start = time.perf_counter()
    for result in walk.run():
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        del result
        start = time.perf_counter()
    said = ranks.tell([seconds, torch.cuda.max_memory_allocated() / 2**30])
    slowest = [max(of_ranks) for of_ranks in zip(*(own for own, _ in said), strict=True)]
    return {
        "first layer s": round(slowest[0], 3),
        "median of the others s": round(statistics.median(slowest[1:] or slowest), 3),
        "peak GiB": [round(peak, 3) for _, peak in said] if len(said) > 1 else round(said[0][1], 3),
    }


def profile(folder: Path, methods: Methods, tokens: torch.Tensor) -> None:
    """Where one warm layer's time goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    walk = walk_of(folder, methods, tokens)
    results = walk.run()
    next(results)
    with trace(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        next(results)
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=60))


def work(rank: int, options: argparse.Namespace, folder: Path, port: int) -> None:
    """The cases, as one of the ranks."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4096, (options.samples, options.length), generator=generator)
    if options.limit:
        torch.cuda.set_per_process_memory_fraction(options.limit * 2**30 / torch.cuda.mem_get_info(rank)[1], rank)
    with joined(rank, options.gpus, torch.device("cuda", rank)) as ranks:
        for name, methods in CASES.items():
            if options.case and name not in options.case:
                continue
            if options.profile and not rank:
                print(name)
            if options.profile:
                profile(folder, methods, tokens)
                continue
            figures = measure(folder, methods, tokens, ranks)
            if not rank:
                print(json.dumps({"case": name, "gpus": options.gpus} | figures), flush=True)


def main() -> None:
    """Print one JSON line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--gpus", type=int, default=1, help="cards that walk together")
    parser.add_argument("--limit", type=float, help="GiB of each card: more is refused, as on a smaller one")
    parser.add_argument("--profile", action="store_true", help="of one card")
    parser.add_argument("--case", action="append", choices=CASES, help="only this case (repeatable)")
    options = parser.parse_args()
    if options.profile and options.gpus > 1:
        parser.error("--profile is of one card")
    print(torch.__version__, torch.cuda.get_device_name())
    with tempfile.TemporaryDirectory() as folder, socket.socket() as found:
        make_checkpoint(Path(folder), options.geometry, options.layers)
        torch.cuda.empty_cache()
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        if options.gpus == 1:
            work(0, options, Path(folder), port)
            return
        # ends the others where one fails
        spawn(work, (options, Path(folder), port), options.gpus)


if __name__ == "__main__":
    main()
