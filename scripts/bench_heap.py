"""What giving freed memory back costs and saves (pipeline/cli/heap.py): pairs of runs, with it and with glibc as it is,
one after the other; processor seconds and the peak of the process's own memory.

    python scripts/bench_heap.py FOLDER                         # the demo model; --model FOLDER takes another
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

from measured_run import KNOWN, load, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="qtool-demo")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--outputs", default="awq,gptq,nf4,gguf")
    options = parser.parse_args()
    recipe = {
        "model": options.model, "output_dir": "artifacts",
        "outputs": [{"method": name} for name in options.outputs.split(",")],
        "calibration": {"text": "qtool-code", "samples": options.samples, "length": 128},
    }  # fmt: skip
    ratios = []
    for pair in range(options.pairs):
        ways = [{}, dict([KNOWN])]
        found = [measure(options.folder / "work", recipe, **way) for way in (ways if pair % 2 else ways[::-1])]
        ours, glibc = found if pair % 2 else found[::-1]
        ratios.append(ours.seconds / glibc.seconds)
        print(f"{ours.seconds:.1f} s with, {glibc.seconds:.1f} s without: {ratios[-1]:.3f}; own memory at most "
              f"{ours.anonymous / 1e6:.0f} and {glibc.anonymous / 1e6:.0f} MB; {load()}", flush=True)  # fmt: skip
    print(f"median ratio {median(ratios):.3f}")


if __name__ == "__main__":
    main()
