"""Seconds and peak memory of one long text by its length: random weights of a known geometry, no download.

    python scripts/bench_long.py [--geometry small|8b|40b] [--length 2048,8192,32768] [--layers 4] [--check]
    python scripts/bench_long.py --geometry 8b --length 131072 --layers 4 --condition q8_0 --condition 4+4096
    NCCL_NVLS_ENABLE=0 python scripts/bench_long.py --geometry 8b --length 131072 --layers 4 --gpus 1,2 --check

A layer's seconds, those of all layers of the geometry at that pace, the head's, and the peak beside what was foretold.
With `--gpus` a row for each number of cards, a process for each: seconds are the slowest one's, and so is the peak; the
last column is a layer's seconds as a part of those of the first number. The first layer, which carries one-time costs,
is left out. `--check` compares every position's logits with transformers' own forward over the whole text (float32,
small lengths); with `--gpus` those of several ranks with one rank's, at the shortest of 8,192 tokens and the length.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn
from transformers import LlamaConfig

from qtool.convert.files.checkpoint import TensorStream
from qtool.convert.models.shape import shape_of
from qtool.convert.skeleton import build_skeleton, expected_shapes
from qtool.evaluate.engines import machine
from qtool.evaluate.engines.condition import PLAIN, Condition
from qtool.evaluate.engines.engine import CHUNK
from qtool.evaluate.engines.layered import Sweep
from qtool.evaluate.engines.reference import FACTS
from qtool.evaluate.engines.share import Share
from qtool.evaluate.engines.streamed import open_streamed
from qtool.evaluate.engines.sweep_memory import peak_bytes, queries_of
from qtool.evaluate.engines.torch_model import compute_dtype, load_model
from qtool.measure.together import share_of
from qtool.quantize.ranks import joined
from qtool.sizing.conditions import cache_bytes

GEOMETRIES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 2, "vocab_size": 4096},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "40b": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 80, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 75858},
}  # fmt: skip
LONGEST = 2**20


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small")
    parser.add_argument("--length", default="2048,8192", help="tokens, comma-separated")
    parser.add_argument("--layers", type=int, help="of the geometry's (default: all)")
    parser.add_argument("--condition", action="append", default=[], help="a cache type, or SINK+RECENT (several)")
    parser.add_argument("--queries", type=int, help="of a chunk (default: as qtool takes them)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpus", default="1", help="cards to one text, comma-separated (with --device cpu: processes)")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    options.lengths = [int(length) for length in options.length.split(",")]
    options.conditions = [PLAIN, *map(_condition, options.condition)]
    numbers = [int(number) for number in options.gpus.split(",")]
    layers = GEOMETRIES[options.geometry]["num_hidden_layers"]
    kind = torch.device(options.device)
    print(f"{options.geometry}, {options.layers or layers} layers, {machine.machine_name(options.device)}, "
          f"{compute_dtype(kind)}\n")  # fmt: skip
    print(f"| ranks | tokens | cache | its size | a layer, s | {layers} layers, s | head, s | peak, GiB "
          "| foretold, GiB | of the first's time |\n|---|---|---|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="qtool-") as folder:
        for number in numbers:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            spawn(_rank, args=(number, options, Path(folder)), nprocs=number)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _rank(rank: int, number: int, options: argparse.Namespace, folder: Path) -> None:
    """One process of ``number``: every length and condition, then the check. ``folder``: for all numbers of ranks."""
    device = torch.device(options.device if number == 1 or options.device == "cpu" else f"cuda:{rank}")
    whole = GEOMETRIES[options.geometry]
    settings = whole | {"num_hidden_layers": options.layers or whole["num_hidden_layers"], "tie_word_embeddings": False}
    config = LlamaConfig(**settings, max_position_embeddings=LONGEST, architectures=["LlamaForCausalLM"])
    config.return_dict = True
    with joined(rank, number, device) as ranks:
        share = share_of(ranks)
        _reset(device)
        base = _peak(device)
        for length in options.lengths:
            for condition in options.conditions:
                _row(config, length, condition, device, options, base, share, folder)
            if options.check and options.gpus == "1":
                _check(config, length, device, options.queries)
        if options.check and number > 1:
            _check_shared(config, min(8192, *options.lengths), device, options.queries, share, folder)


def _condition(text: str) -> Condition:
    if "+" not in text:
        return Condition(text)
    sink, _, recent = text.partition("+")
    return Condition("", int(sink), int(recent))


def _stream(config: Any, device: torch.device) -> Any:
    """Random weights, made when they are read: the same for the same name."""
    shapes, _ = expected_shapes(build_skeleton(config))

    def read(prefix: str) -> TensorStream:
        for number, (name, shape) in enumerate(shapes.items()):
            if name.startswith(prefix):
                generator = torch.Generator(device).manual_seed(number)
                drawn = torch.randn(shape, generator=generator, device=device, dtype=compute_dtype(device))
                yield name, drawn * 0.02 if len(shape) > 1 else torch.ones_like(drawn)

    return read


def _row(
    config: Any, length: int, condition: Condition, device: torch.device, options: argparse.Namespace, base: int,
    share: Share, folder: Path,
) -> None:  # fmt: skip
    """``base``: bytes that the process has before anything is computed, its libraries'."""
    layers = GEOMETRIES[options.geometry]["num_hidden_layers"]
    shape = shape_of(config.to_dict())
    chunk = options.queries or queries_of(shape, length)
    foretold = peak_bytes(shape, length, chunk, compute_dtype(device).itemsize, share.number)
    _reset(device)
    model = open_streamed(FACTS, _stream(config, device), config, device, False)
    window = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    marks: list[float] = []

    def done() -> None:
        _wait(device)
        marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory(prefix="qtool-") as place:
        kept = Path(share.tell(place)[0])
        sweep = Sweep(model, chunk, kept, condition, every=1e9, progress=done, share=share)
        states = sweep.states(window)
        _wait(device)
        begun = time.perf_counter()
        for logits in sweep.logits(states):
            torch.log_softmax(logits.float(), -1)
        _wait(device)
        head = time.perf_counter() - begun
        steps = [later - earlier for earlier, later in pairwise(marks)]
        found = share.tell([steps, head, (_peak(device) - base) / 2**30])  # nobody is still in the folder
    if share.rank:
        return
    slowest = sorted(max(of_ranks) for of_ranks in zip(*(one[0] for one in found), strict=True))
    each = slowest[len(slowest) // 2] if slowest else float("nan")
    first = folder / f"{length} {condition.name}"
    if not first.exists():
        first.write_text(str(each))
    size = cache_bytes(shape, condition, length) * layers / config.num_hidden_layers / 2**30
    print(f"| {share.number} | {length:,} | {condition.name or 'own'} | {size:.3f} GiB | {each:.3f} "
          f"| {each * layers:.1f} | {max(one[1] for one in found):.2f} | {max(one[2] for one in found):.2f} "
          f"| {foretold / 2**30:.2f} | {each / float(first.read_text()):.2f} |", flush=True)  # fmt: skip


@torch.inference_mode()
def _check(config: Any, length: int, device: torch.device, queries: int | None) -> None:
    """Against the whole forward, in `CHUNK` positions of logits at a time."""
    read = _stream(config, device)
    window = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    whole: Any = load_model(read(""), config, device)
    expected = whole(input_ids=window[None].to(device), use_cache=False).logits[0]
    model = open_streamed(FACTS, read, config, device, False)
    with tempfile.TemporaryDirectory(prefix="qtool-") as folder:
        sweep = Sweep(model, queries or queries_of(shape_of(config.to_dict()), length), Path(folder))
        found = sweep.logits(sweep.states(window))
        apart = [
            float((part - expected[start : start + CHUNK]).abs().max())
            for start, part in zip(range(0, length, CHUNK), found, strict=True)
        ]
    span = float(expected.abs().max())
    print(f"{length:,} tokens: largest difference of any logit {max(apart):.2e}, of logits up to {span:.2f}")
    if device.type == "cpu" and max(apart) > 1e-4:
        raise SystemExit("not equal to transformers' own forward")


@torch.inference_mode()
def _check_shared(
    config: Any, length: int, device: torch.device, queries: int | None, share: Share, folder: Path
) -> None:
    """Against the same sweep by this rank alone: of its own positions' logits the largest difference."""
    model = open_streamed(FACTS, _stream(config, device), config, device, False)
    window = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    chunk = queries or queries_of(shape_of(config.to_dict()), length)
    together = Sweep(model, chunk, folder / f"check-{share.number}", share=share)
    found = list(together.logits(together.states(window)))
    alone = Sweep(model, chunk, folder / f"check-{share.number}-{share.rank}")
    states = alone.states(window)
    apart, span = 0.0, 0.0
    for start, part in zip(share.starts(length), found, strict=True):
        expected = model.head(states[start : start + CHUNK])
        apart = max(apart, float((part - expected).abs().max()))
        span = max(span, float(expected.abs().max()))
    told = share.tell([apart, span])
    if share.rank == 0:
        print(f"{share.number} ranks, {length:,} tokens: largest difference of any logit from one rank's "
              f"{max(one for one, _ in told):.2e}, of logits up to {max(one for _, one in told):.2f}")  # fmt: skip


def _reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    machine.reset_resident_peak()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else machine.resident_peak() or 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
