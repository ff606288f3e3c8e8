"""Seconds that a whole 8B model's linears take into Q4_K_M on one accelerator, with importance rows; blocks checked.

    python scripts/bench_kquants.py [--layers 32] [--plain] [--profile]
    python scripts/bench_kquants.py --descent [--intermediate 14336]

Llama-3.1-8B geometry (hidden 4096, intermediate 14336, key/value width 1024), random bf16 weights made layer by layer
and resident when the clock (CUDA events) runs. Types as llama.cpp gives them: Q6_K for half the layers' attn_v and
ffn_down, Q4_K elsewhere. Sampled rows are compared with the plain PyTorch twin on the CPU. With --descent one layer of
the first kind goes into its types by descent on Gram matrices of correlated inputs: seconds, how much of them kernels
ran and how many, loss beside that of `rounding: ggml`, and memory beside what `workspace` says; then small matrices of
every type on the accelerator and on the CPU: codes that are equal after each stage, and losses (exit 1 where these
differ). The kernels' first compilation takes a minute or two. Runs from a checkout without an installation: nothing but
torch, Triton and click is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336),
}  # fmt: skip
LAYERS = 32
EXTRA = ("Q5_K", "Q8_0", "Q5_0", "Q5_1")  # timed on one down_proj: what other recipes use


def find_package() -> None:
    """Folder ``X/`` of the checkout imports as ``qtool.X`` where qtool is not installed."""
    try:
        import qtool.quantize.methods.kquants  # noqa: F401  # is it there?
    except ImportError:
        for name, folder in (("qtool", "pipeline"), ("qtool.convert", "convert"), ("qtool.quantize", "quantize")):
            module = types.ModuleType(name)
            module.__path__ = [str(ROOT / folder)]
            sys.modules[name] = module
        try:
            import click

            error: type[Exception] = click.ClickException
        except ImportError:
            error = Exception
        sys.modules["qtool"].QtoolError = type("QtoolError", (error,), {})  # type: ignore[attr-defined]  # the hollow module


def more_bits(layer: int) -> bool:
    """llama.cpp's use_more_bits for 32 layers."""
    return layer < LAYERS // 8 or layer >= 7 * LAYERS // 8 or (layer - LAYERS // 8) % 3 == 2


def type_of(linear: str, layer: int) -> str:
    """Q4_K_M's rule."""
    return "Q6_K" if linear in ("v_proj", "down_proj") and more_bits(layer) else "Q4_K"


def make_layer(seed: int) -> dict[str, torch.Tensor]:
    """bf16 weights with a heavy tail, as trained ones have."""
    generator = torch.Generator("cuda").manual_seed(seed)
    made = {}
    for name, shape in SHAPES.items():
        normal = torch.randn(shape, generator=generator, device="cuda")
        made[name] = (normal * (1 + normal.abs() / 4) * 0.02).to(torch.bfloat16)
    return made


def seconds(action: Callable[[], Any]) -> float:
    """One run by CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    action()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


def check(quantize: Callable[..., Any], weight: torch.Tensor, kind: str, row: torch.Tensor | None) -> int:
    """Bytes of 8 sampled rows that differ from the plain twin's."""
    rows = torch.linspace(0, weight.shape[0] - 1, 8, device="cuda").long()
    kernel = quantize(weight, kind, row).data[rows].cpu()
    plain = quantize(weight[rows].cpu(), kind, None if row is None else row.cpu()).data
    return int((kernel != plain).sum())


def gram_of(columns: int, device: str) -> torch.Tensor:
    """Damped, of inputs each of which is a sum of others."""
    inputs = torch.randn(3 * columns, columns, device=device) @ torch.randn(columns, columns, device=device).tril()
    gram = inputs.t() @ inputs
    gram.diagonal().add_(0.1 * gram.diagonal().mean())
    return gram


def profiled(action: Callable[[], Any]) -> dict[str, Any]:
    """One more run, watched: kernels, the milliseconds they ran, and of those that ran longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        action()
        torch.cuda.synchronize()
    events = [event for event in watched.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in events) / 1000
    longest = {event.key[:40]: round(event.self_device_time_total / 1000, 1) for event in events[:8]}
    return {"kernels": sum(event.count for event in events), "their ms": round(busy, 1), "of the longest": longest}


def descend_layer() -> None:
    """Print a JSON line for each type of each feed, the second call of each type's shapes timed."""
    from qtool.quantize.methods.kquant_rounding import quantize, workspace
    from qtool.quantize.methods.kquants import quantize as search
    from qtool.quantize.rounding import factorize

    weights, total = make_layer(0), 0.0
    feeds = (("q_proj", "k_proj"), ("v_proj",), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    for names in feeds:
        target, kind = torch.cat([weights[name].float() for name in names]), type_of(names[0], 0)
        out, columns = target.shape
        gram = gram_of(columns, "cuda")
        factor = factorize(gram, 1e-6)
        compiling = seconds(lambda: quantize(target[:64], factor, gram, kind))  # noqa: B023  # called at once
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        took = seconds(lambda: quantize(target, factor, gram, kind))  # noqa: B023
        peak = torch.cuda.max_memory_allocated() - before
        total += took
        blocks = (quantize(target, factor, gram, kind), search(target, kind, gram.diagonal()))
        errors = [block.dequantize().sub_(target) for block in blocks]
        ours, theirs = (float(((error @ gram) * error).sum()) for error in errors)
        line = {"feed": names, "type": kind, "s": round(took, 3), "loss / ggml's": round(ours / theirs, 4)}
        line |= {"MiB": peak >> 20, "workspace MiB": 4 * workspace(out, columns) >> 20, "first s": round(compiling, 1)}
        print(json.dumps(line), flush=True)
        print(json.dumps(profiled(lambda: quantize(target, factor, gram, kind))), flush=True)  # noqa: B023
    print(json.dumps({"a layer by descent, s": round(total, 3)}), flush=True)


def compare_paths(rows: int = 512) -> bool:
    """Whether the kernels lose what the plain code on the CPU loses, to 0.3 %; a JSON line for each type. A near tie
    that falls the other way moves the rest of its row; within one super-block little can follow."""
    from qtool.quantize.methods import kquant_rounding, kquants
    from qtool.quantize.methods.kquant_blocks import KINDS, ChosenBlocks
    from qtool.quantize.methods.kquant_rounding import begin, descend, quantize
    from qtool.quantize.rounding import Factor, factorize

    kquant_rounding.quantize_ggml = kquants.quantize  # type: ignore[attr-defined]  # on the CPU, too: needs no package
    agree = True
    for kind in KINDS:
        line: dict[str, Any] = {"type": kind}
        for columns in (256, 1024):
            target, gram = torch.randn(rows, columns) * 0.02, gram_of(columns, "cpu")
            factor = factorize(gram, 1e-6)
            there, metric = Factor(factor.upper.cuda(), factor.damp), gram.cuda()
            if columns == 256:
                plain = begin(target, factor, kind)
                kernel = begin(target.cuda(), there, kind)
                line["first visit: equal"] = round(float((plain.codes == kernel.codes.cpu()).float().mean()), 4)
                moved = ChosenBlocks(plain.kind, *(part.cuda() for part in plain.numbers))
                again, other = descend(target, plain, gram, 1), descend(target.cuda(), moved, metric, 1)
                line["a later visit: equal"] = round(float((again.codes == other.codes.cpu()).float().mean()), 4)
            blocks = (quantize(target, factor, gram, kind), quantize(target.cuda(), there, metric, kind))
            errors = [block.dequantize().cpu().sub_(target).double() for block in blocks]
            ours, theirs = (float(((error @ gram.double()) * error).sum()) for error in errors)
            line[f"{columns} columns: loss / the plain code's"] = round(theirs / ours, 6)
            agree &= abs(theirs / ours - 1) < 3e-3
        print(json.dumps(line), flush=True)
    return agree


def profile_kinds(
    quantize: Callable[..., Any], weight: torch.Tensor, kinds: tuple[str, ...], importance: torch.Tensor | None
) -> None:
    """Print the kernels that take longest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    with trace(activities=[ProfilerActivity.CUDA]) as found:
        for kind in kinds:
            quantize(weight, kind, importance)
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=16, max_name_column_width=40))


def main() -> None:
    """Print one JSON line for the model, one for each other type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--plain", action="store_true", help="without importance rows")
    parser.add_argument("--descent", action="store_true", help="one layer by descent")
    parser.add_argument("--intermediate", type=int, default=14336, help="columns of down_proj")
    parser.add_argument("--profile", action="store_true", help="time by kernel for one layer")
    options = parser.parse_args()
    find_package()
    from qtool.quantize.methods.kquants import quantize

    print(torch.__version__, torch.cuda.get_device_name(), flush=True)
    if options.descent:
        wide = options.intermediate
        SHAPES.update(gate_proj=(wide, 4096), up_proj=(wide, 4096), down_proj=(4096, wide))
        descend_layer()
        sys.exit(0 if compare_paths() else 1)
    widths = {columns for _, columns in SHAPES.values()}
    importance = {n: None if options.plain else torch.rand(n, device="cuda").pow(4) + 1e-3 for n in widths}
    kinds = ("Q4_K", "Q6_K", *EXTRA)
    weight = make_layer(0)["down_proj"]
    compiling = {kind: round(seconds(partial(quantize, weight, kind, importance[14336])), 2) for kind in kinds}
    print(json.dumps({"first call s (compiles)": compiling}), flush=True)
    total = bits = count = differing = 0.0
    by_type: dict[str, list[float]] = {}
    for layer in range(options.layers):
        weights = make_layer(layer)

        def whole(weights: dict[str, torch.Tensor] = weights, layer: int = layer) -> None:
            for name, weight in weights.items():
                quantize(weight, type_of(name, layer), importance[weight.shape[1]])

        total += seconds(whole)
        for name, weight in weights.items():
            kind = type_of(name, layer)
            data = quantize(weight, kind, importance[weight.shape[1]]).data
            bits, count = bits + 8.0 * data.numel(), count + weight.numel()
            if layer in (0, options.layers // 2 + 1):
                differing += check(quantize, weight, kind, importance[weight.shape[1]])
    figures = {
        "layers": options.layers, "weights": count, "importance": not options.plain, "total s": round(total, 4),
        "GB/s of bf16": round(2 * count / total / 1e9, 1), "bpw": round(bits / count, 4),
        "bytes unlike the twin's": int(differing), "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }  # fmt: skip
    print(json.dumps(figures), flush=True)
    for kind in kinds:
        row = torch.rand(14336, device="cuda").pow(4) + 1e-3  # whether or not the model above was weighed
        best = min(seconds(partial(quantize, weight, kind, row)) for _ in range(5))
        by_type[kind] = [round(2 * weight.numel() / best / 1e9, 1), check(quantize, weight, kind, row)]
        unweighed = min(seconds(partial(quantize, weight, kind)) for _ in range(5))
        by_type[kind] += [round(2 * weight.numel() / unweighed / 1e9, 1), check(quantize, weight, kind, None)]
    print(json.dumps({"type: GB/s and unlike bytes, with and without importance": by_type}), flush=True)
    if options.profile:
        profile_kinds(quantize, weight, kinds, importance[14336])


if __name__ == "__main__":
    main()
