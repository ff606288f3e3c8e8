"""The plan's host memory against what a run took of its own, for several models and outputs; or in a limit.

    python scripts/bench_host_memory.py FOLDER [--moe MODEL]    # random models of several shapes are made in FOLDER
    python scripts/bench_host_memory.py FOLDER --geometry 40b --layers 2 4 8 --limit 24        # on an accelerator
    python scripts/bench_host_memory.py FOLDER --geometry tiny --layers 2 4 --limit 1 --samples 8 --length 256

With --geometry: `qtool run` of models of one shape with so many layers, the same first layers in each; AWQ + GPTQ +
Q4_K_M, on the accelerator if there is one; in a limit of host memory that says how it is held (scripts/limited.py).
Anonymous memory that does not grow with layers is a table whose column does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import limited
import torch
from bench_run import GEOMETRIES, make_model
from measured_run import measure

TEXT = Path(__file__).parent.parent / "quantize" / "data" / "calibration.jsonl"

ROUNDED = [{"method": "nf4", "rounding": "absmax"}, {"method": "gguf", "rounding": "ggml"}]
ROUNDED += [{"method": "gguf", "name": "q8", "type": "Q8_0"}]
AWQ: dict[str, Any] = {"method": "awq", "descent": False}
GPTQ: dict[str, Any] = {"method": "gptq", "descent": False}
# name -> geometry, layers, outputs, windows of calibration
CASES: dict[str, tuple[str, int, list[dict[str, Any]], int]] = {
    "tiny, AWQ": ("tiny", 2, [AWQ], 16),
    "tiny, AWQ + GPTQ": ("tiny", 2, [AWQ, GPTQ], 64),
    "small, rounded": ("small", 4, ROUNDED, 2),
    "least, rounded, 80 layers": ("least", 80, ROUNDED, 2),
    "small, rounded, 80 layers": ("small", 80, ROUNDED, 2),
    "small, AWQ": ("small", 2, [AWQ], 4),
    "small, AWQ + GPTQ": ("small", 2, [AWQ, GPTQ], 4),
    "mid, rounded": ("mid", 3, ROUNDED, 2),
    "mid, GPTQ": ("mid", 2, [GPTQ], 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moe", type=Path, help="a small mixture of experts, too")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--geometry", choices=GEOMETRIES, help="runs in a limit, of one shape")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--limit", type=float, default=24.0, help="GiB of host memory")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--outputs", default="awq,gptq,gguf")
    options = parser.parse_args()
    if options.geometry:
        raise SystemExit(in_a_limit(options))
    cases = {name: (f"{kind}-{layers}", kind, layers, outputs, samples)
             for name, (kind, layers, outputs, samples) in CASES.items()}  # fmt: skip
    print(
        "| model, outputs | planned MB | measured MB | planned / measured |", "|---|---|---|---|", sep="\n", flush=True
    )
    for name, (folder, kind, layers, outputs, samples) in cases.items():
        if options.only in name:
            model = options.folder / folder
            if not model.exists():
                make_model(model, kind, layers)
            _row(name, model, outputs, samples, options.folder)
    for name, outputs in (("mixture, AWQ", [AWQ]), ("mixture, AWQ + GPTQ", [AWQ, GPTQ])) if options.moe else ():
        if options.only in name:
            _row(name, options.moe, outputs, 32, options.folder)


def in_a_limit(options: argparse.Namespace) -> int:
    """A line for each number of layers; 1 where a run did not end well."""
    counts, card = sorted(options.layers), torch.cuda.is_available()
    options.folder.mkdir(parents=True, exist_ok=True)
    whole = options.folder / f"{options.geometry}-{counts[-1]}"
    if not whole.exists():
        make_model(whole, options.geometry, counts[-1], "cuda" if card else "cpu")
        torch.cuda.empty_cache()
    text = options.folder / "text.txt"
    write_text(text, options.samples * options.length)
    print(f"{options.geometry}, {options.outputs}, {options.samples} x {options.length} tokens, "
          f"{torch.cuda.get_device_name() if card else 'processor'}, limit {options.limit:g} GiB")  # fmt: skip
    print("| layers | source GB | s | planned GB | own GB, at most | the limit's own | with files | stages |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    worst = 0
    for count in counts:
        model = whole if count == counts[-1] else first_layers(whole, count)
        recipe = {
            "model": str(model.resolve()), "output_dir": "artifacts",
            "outputs": [{"method": name} for name in options.outputs.split(",")],
            "calibration": {"text": str(text.resolve()), "samples": options.samples, "length": options.length},
        }  # fmt: skip
        worst = max(worst, _limited_row(count, model, recipe, options, card))
    return worst


def _limited_row(count: int, model: Path, recipe: dict[str, Any], options: argparse.Namespace, card: bool) -> int:
    work = options.folder / "limited"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    qtool = [sys.executable, "-P", "-m", "qtool"]
    plan = subprocess.run(
        [*qtool, "plan", "recipe.yaml", "--json"], cwd=work, env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    planned = json.loads(plan.stdout)["host_bytes"]
    used = limited.run([*qtool, "run", "recipe.yaml", "-q"], work, environment, options.limit, card)
    if used.code:
        print(f"{count} layers: ended with {used.code} in {used.how}:\n{used.said[-1500:]}", flush=True)
        return 1
    (result,) = work.glob("runs/*/result.json")
    found = json.loads(result.read_text())
    source = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in found["stages"].items() if seconds >= 1)
    figures = [planned, found["peaks"]["anonymous"], used.anonymous, used.most or used.anonymous + used.files]
    cells = " | ".join(f"{figure / 1e9:.2f}" for figure in figures)
    print(f"| {count} | {source / 1e9:.2f} | {used.seconds:.0f} | {cells} | {stages} |")
    print(f"held by {used.how}", flush=True)
    shutil.rmtree(work)
    return 0


def first_layers(whole: Path, count: int) -> Path:
    """A model of the first layers of another, in the same files."""
    folder = whole.with_name(f"{whole.name}-first-{count}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    places = json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"]
    outside = [tensor for tensor in places if ".layers." not in tensor]
    within = [tensor for tensor in places if ".layers." in tensor and int(tensor.split(".")[2]) < count]
    kept = {tensor: places[tensor] for tensor in outside + within}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": kept}))
    for name in set(kept.values()):
        os.link(whole / name, folder / name)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": count}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_text(path: Path, tokens: int) -> None:
    """Lines of the code that ships, in another order each time, until there are enough: a token is three letters."""
    rows = [json.loads(line)["text"] for line in TEXT.read_text(encoding="utf-8").splitlines()]
    lines = [line for row in rows for line in row.splitlines()]
    order = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < 5 * tokens:
            order.shuffle(lines)
            file.write("\n".join(lines) + "\n")


def _row(name: str, model: Path, outputs: list[dict[str, Any]], samples: int, folder: Path) -> None:
    recipe = {
        "model": str(model.resolve()), "calibration": {"text": "qtool-code", "samples": samples, "length": 256},
        "outputs": outputs, "output_dir": "artifacts",
    }  # fmt: skip
    found = measure(folder / "memory", recipe)
    ratio = found.planned / found.anonymous
    print(f"| {name} | {found.planned / 1e6:.0f} | {found.anonymous / 1e6:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
