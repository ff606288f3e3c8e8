"""The plan's host memory against what a run on a processor took of its own, for several models and outputs.

python scripts/bench_host_memory.py FOLDER [--moe MODEL]        # random models of several shapes are made in FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench_run import make_model
from measured_run import measure

ROUNDED = [{"method": "nf4", "rounding": "absmax"}, {"method": "gguf", "rounding": "ggml"}]
ROUNDED += [{"method": "gguf", "name": "q8", "type": "Q8_0"}]
AWQ: dict[str, Any] = {"method": "awq", "descent": False}
GPTQ: dict[str, Any] = {"method": "gptq", "descent": False}
# name -> geometry, layers, outputs, windows of calibration
CASES: dict[str, tuple[str, int, list[dict[str, Any]], int]] = {
    "tiny, AWQ": ("tiny", 2, [AWQ], 16),
    "tiny, AWQ + GPTQ": ("tiny", 2, [AWQ, GPTQ], 64),
    "small, rounded": ("small", 4, ROUNDED, 2),
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
    options = parser.parse_args()
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
