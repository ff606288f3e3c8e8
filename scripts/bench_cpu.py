"""Wall time and peak memory of a conversion on the CPU, as a user runs it.

    python scripts/bench_text.py BENCH MODEL              # once: the calibration text
    python scripts/bench_cpu.py BENCH MODEL --out DIR [--case all|awq|gptq|…] [--threads 2]

64 x 512 tokens, group 64. Prints one JSON line. A peer on the same tokens: scripts/peer_gptqmodel.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from qtool.convert.files.source import resolve
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.text.windows import token_windows
from qtool.make.job import open_job
from qtool.make.outputs import make_artifacts
from qtool.quantize.calibration import CalibrationSet
from qtool.recipe.sections import Recipe

CASES: dict[str, list[dict[str, Any]]] = {
    "awq": [{"method": "awq"}],
    "awq-source": [{"method": "awq", "propagate_error": False}],
    "awq-rtn": [{"method": "awq", "rounding": "rtn"}],
    "rtn": [{"method": "awq", "scaling": "none", "rounding": "rtn", "clip": False}],
    "gptq": [{"method": "gptq"}],
    "gptq-awq": [{"method": "gptq", "scaling": "awq"}],
    "all": [{"method": "awq"}, {"method": "gptq"}, {"method": "nf4"}],
    "all-source": [
        {"method": "awq", "propagate_error": False},
        {"method": "gptq", "propagate_error": False},
        {"method": "nf4"},
    ],
}


def _section(case: str, section: dict[str, Any]) -> dict[str, Any]:
    size = {} if section["method"] == "nf4" else {"group_size": 64}
    return section | size | {"name": f"{case}-{section['method']}"}


def main() -> None:
    """Convert and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", choices=CASES, default="awq")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another key of the output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    changes = {key: json.loads(value) for key, value in (item.split("=", 1) for item in options.set)}
    recipe = Recipe.model_validate(
        {
            "model": str(options.model),
            "calibration": {"text": str(options.bench / "calibration.jsonl"), "samples": 64, "length": 512},
            "outputs": [_section(options.case, section) | changes for section in CASES[options.case]],
            "output_dir": str(options.out),
        }
    )
    start = time.perf_counter()
    job = open_job(recipe, resolve(recipe.model.id), torch.device("cpu"), recipe.outputs)
    for output in job.outputs:
        shutil.rmtree(output.folder, ignore_errors=True)
    tokens = token_windows(recipe.calibration, load_tokenizer(job.source.path))
    artifacts = make_artifacts(job, CalibrationSet(tokens, "bench"))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    for name, artifact in artifacts.items():
        print(
            json.dumps(
                {"case": name, "path": str(artifact.path), "seconds": round(seconds, 1), "peak GiB": round(peak, 2)}
            )
        )


if __name__ == "__main__":
    main()
