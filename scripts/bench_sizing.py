"""Predicted against measured on an accelerator: memory, prefill and decode of random weights of known geometries.

    python scripts/bench_sizing.py --out sizing.json [--model 8b --model 40b] [--seconds 520]

bf16 weights are drawn on the card (no file, no download); each cell of contexts x batches predicted to fit is run, and
for each batch the first one predicted not to. A cell is one whole prefill through transformers' own Llama with SDPA
attention and logits of the last position alone, as `generate` does it, then a few decode steps on its DynamicCache.
Memory is the allocator's peak less the weights. Needs torch, transformers, click and PyYAML; not pydantic. Results are
written after every cell, so that a run cut short leaves what it measured. `--model tiny --device cpu` tries the script
out without an accelerator (times only: the CPU's allocator keeps no peak).
"""

from __future__ import annotations

import os

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

if importlib.util.find_spec("qtool") is None:  # not installed: the the folders beside this one are the package
    top = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location(
        "qtool", top / "pipeline/__init__.py", submodule_search_locations=[str(top / "pipeline"), str(top)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["qtool"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["qtool"])

from qtool.convert.models.geometry import Geometry
from qtool.convert.models.shape import read_geometry, tensor_shapes
from qtool.evaluate.engines.facts import Load
from qtool.evaluate.engines.transformers import FACTS, activations, cublas_workspace
from qtool.sizing.accelerators import Accelerator, choose, load_accelerators
from qtool.sizing.bounds import decode_seconds, prefill_seconds
from qtool.sizing.kv_cache import kv_bytes

GIB = 2**30
MODELS: dict[str, dict[str, Any]] = {
    "8b": {  # Llama-3.1-8B
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
    "40b": {  # IQuest-Coder-V1-40B
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 80, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 76800,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
    },
}  # fmt: skip
CONTEXTS = (2048, 8192, 32768, 65536, 131072)
BATCHES = (1, 2, 4, 8)
DECODED = 6  # steps; the first is not timed
OUT_OF_MEMORY = "out of memory"


def build(config: dict[str, Any], device: torch.device) -> Any:
    """The model with weights drawn on ``device``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(**{**config, "rope_theta": 500000.0})
    settings._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(settings).to(torch.bfloat16)
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=settings).to(device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02)
    return model.eval().requires_grad_(False)


def predict(geometry: Geometry, card: Accelerator, weights: int, context: int, batch: int) -> dict[str, Any]:
    """Bytes beside the weights (allocator), bytes in all (device), ranges of seconds."""
    cache = kv_bytes(geometry, FACTS, context + DECODED, batch, "bf16")
    overhead = FACTS.overhead(Load(geometry, card, 1, context, batch))
    head = geometry.head_weights * geometry.width
    layers = weights - head * (1 if geometry.tied else 2)
    prefill = prefill_seconds(geometry, FACTS, card, context, batch, layers)
    decode = decode_seconds(geometry, FACTS, card, layers, head, cache, batch)
    assert prefill is not None
    device = weights + cache + overhead.total
    return {
        "beside_weights": cache + activations(geometry, context, batch) + cublas_workspace(card.compute),
        "device": device,
        "fits": device <= card.memory,
        "prefill_s": [prefill.best, prefill.slow],
        "decode_s": [decode.best, decode.slow],
    }


class Card:
    """Memory and clock of the device; a CPU has the clock only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def wait(self) -> float:
        """The time once everything queued is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def clear(self) -> int:
        """Let go of what is free and forget the peak; bytes still allocated."""
        gc.collect()
        if not self.cuda:
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> dict[str, int | None]:
        """The allocator's peak, and what the device's driver says is taken."""
        if not self.cuda:
            return {"allocated": None, "device": None}
        free, total = torch.cuda.mem_get_info()
        return {"allocated": torch.cuda.max_memory_allocated(), "device": total - free}


@torch.inference_mode()
def measure(model: Any, card: Card, context: int, batch: int, vocab: int, held: int) -> dict[str, Any]:
    """One prefill and `DECODED` steps; medians of the steps. ``held``: bytes of the weights."""
    card.clear()
    ids = torch.randint(0, vocab, (batch, context), device=card.device)
    started = card.wait()
    out = model(ids, use_cache=True, logits_to_keep=1)
    prefill = card.wait() - started
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    del out
    steps = []
    for _ in range(DECODED):
        started = card.wait()
        out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        steps.append(card.wait() - started)
    peak = card.peak()
    beside = None if peak["allocated"] is None else peak["allocated"] - held
    return {
        "beside_weights": beside, "device": peak["device"], "prefill_s": prefill,
        "decode_s": statistics.median(steps[1:]), "decode_steps_s": steps,
    }  # fmt: skip


def judge(predicted: dict[str, Any], found: dict[str, Any]) -> dict[str, bool | None]:
    """Memory within 10 % or 0.5 GiB; times inside their ranges; the boundary where it was predicted."""
    verdicts: dict[str, bool | None] = {"boundary": predicted["fits"] == ("prefill_s" in found)}
    if "prefill_s" not in found:
        return verdicts
    if found["beside_weights"] is not None:
        difference = abs(found["beside_weights"] - predicted["beside_weights"])
        verdicts["memory"] = difference <= max(0.1 * found["beside_weights"], GIB / 2)
    for key in ("prefill_s", "decode_s"):
        low, high = predicted[key]
        verdicts[key] = low <= found[key] <= high
    return verdicts


def line(cell: dict[str, Any]) -> str:
    """A row that a person reads: predicted | measured."""
    p, m = cell["predicted"], cell["measured"]

    def gib(nbytes: float | None) -> str:
        return "    -" if nbytes is None else f"{nbytes / GIB:7.2f}"

    head = f"{cell['model']:>4} {cell['context']:>7} x {cell['batch']}  "
    if "prefill_s" not in m:
        return f"{head}beside weights {gib(p['beside_weights'])} GiB  {m['status']}  ok={cell['ok']}"
    return (
        f"{head}beside weights {gib(p['beside_weights'])} | {gib(m['beside_weights'])} GiB  "
        f"device {gib(p['device'])} | {gib(m['device'])}  "
        f"prefill {p['prefill_s'][0]:.3f}..{p['prefill_s'][1]:.3f} | {m['prefill_s']:.3f} s  "
        f"decode {1e3 * p['decode_s'][0]:.1f}..{1e3 * p['decode_s'][1]:.1f} | {1e3 * m['decode_s']:.1f} ms  "
        f"ok={cell['ok']}"
    )


def cells_of(plan: dict[tuple[int, int], dict[str, Any]]) -> list[tuple[int, int]]:
    """Cells that fit, cheapest first, then for each batch the first that does not."""
    fitting = sorted((c for c in plan if plan[c]["fits"]), key=lambda cell: plan[cell]["prefill_s"][0])
    probes = []
    for batch in sorted({batch for _, batch in plan}):
        beyond = sorted(context for context, b in plan if b == batch and not plan[context, b]["fits"])
        probes += [(beyond[0], batch)] if beyond else []
    return fitting + probes


def run(name: str, card: Accelerator, device: torch.device, options: argparse.Namespace, report: Any) -> None:
    """All cells of one model."""
    config = MODELS[name]
    full = config | {"max_position_embeddings": 131072, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    geometry = read_geometry(full)
    width = geometry.width
    weights = sum(width * torch.Size(shape).numel() for shape in tensor_shapes(full).values())
    plan = {(c, b): predict(geometry, card, weights, c, b) for c in options.context for b in options.batch}
    clock = Card(device)
    before = clock.clear()
    model = build({**config, "max_position_embeddings": 131072, "tie_word_embeddings": False}, device)
    held = clock.clear() - before
    print(f"{name}: weights {weights / GIB:.3f} GiB predicted, {held / GIB:.3f} GiB allocated", flush=True)
    report.add({"model": name, "weights": {"predicted": weights, "measured": held or None}})
    measure(
        model, clock, min(512, min(options.context)), 1, geometry.vocab, held
    )  # libraries and kernels are loaded here
    for context, batch in cells_of(plan):
        predicted = plan[context, batch]
        cell: dict[str, Any] = {"model": name, "context": context, "batch": batch, "predicted": predicted}
        low, high = predicted["prefill_s"]
        if options.deadline - time.monotonic() < min(2.2 * low, high) + 2:
            cell |= {"measured": {"status": "not run: no time left"}, "ok": {}}
        else:
            try:
                cell["measured"] = measure(model, clock, context, batch, geometry.vocab, held)
            except torch.OutOfMemoryError:
                cell["measured"] = {"status": OUT_OF_MEMORY}
            cell["ok"] = judge(predicted, cell["measured"])
        report.add(cell)
        print(line(cell), flush=True)
        clock.clear()
    del model
    clock.clear()


class Report:
    """The file that holds everything measured so far."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head, self.cells = path, head, []  # type: ignore[var-annotated]

    def add(self, cell: dict[str, Any]) -> None:
        self.cells.append(cell)
        self.path.write_text(json.dumps(self.head | {"cells": self.cells}, indent=1) + "\n", encoding="utf-8")

    def summary(self) -> str:
        verdicts = [item for cell in self.cells for item in cell.get("ok", {}).items() if item[1] is not None]
        kinds = sorted({kind for kind, _ in verdicts})
        held = {kind: [value for found, value in verdicts if found == kind] for kind in kinds}
        return "; ".join(f"{kind}: {sum(values)} of {len(values)} as predicted" for kind, values in held.items())


def main() -> None:
    """Print a line for each cell and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, rewritten after every cell")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: 8b, then 40b")
    parser.add_argument("--gpu", help="name of the card's row in accelerators.yaml (default: from the device's name)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--context", type=int, action="append", help="default: 2K, 8K, 32K, 64K, 128K")
    parser.add_argument("--batch", type=int, action="append", help="default: 1, 2, 4, 8")
    parser.add_argument(
        "--seconds", type=float, default=520, help="stop starting cells after this (default: %(default)s)"
    )
    options = parser.parse_args()
    options.deadline = time.monotonic() + options.seconds
    options.context, options.batch = options.context or list(CONTEXTS), options.batch or list(BATCHES)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    cards = load_accelerators()
    asked = options.gpu or next((key for key in sorted(cards, key=len, reverse=True) if key in name), "H200")
    (card,) = choose(cards, asked)
    import transformers

    head = {"device": name, "card": card.key, "torch": torch.__version__, "transformers": transformers.__version__}
    if device.type == "cuda":
        head["total_gib"] = torch.cuda.mem_get_info()[1] / GIB
    print(json.dumps(head), flush=True)
    report = Report(options.out, head | {"settings": "bf16, SDPA, whole prefill, logits of the last position"})
    for model in options.model or ["8b", "40b"]:
        run(model, card, device, options, report)
    print(report.summary())


if __name__ == "__main__":
    main()
