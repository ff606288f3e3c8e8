"""Which strength of propagation, damping and clipping costs least: mean KL of many settings on one model in one run.

    python scripts/sweep_rounding.py MODEL CALIBRATION HELDOUT [--group-size N] [--samples N] [--length N] [--quick]

MODEL: a folder or `qtool-demo`; CALIBRATION and HELDOUT: texts as a recipe names them. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from qtool.convert.checkpoint import Checkpoint
from qtool.convert.skeleton import load_config
from qtool.convert.source import resolve
from qtool.convert.text import TextSource, load_tokenizer, token_windows
from qtool.evaluate import fidelity
from qtool.evaluate.generate import load_model
from qtool.evaluate.regression import bootstrap_mean
from qtool.job import open_job
from qtool.outputs import make_artifacts
from qtool.quantize.calibration import CalibrationSet
from qtool.recipe import Recipe

SETTINGS: dict[str, dict[str, Any]] = {
    "rtn, no scaling, no clipping": {"scaling": "none", "rounding": "rtn", "clip": False},
    "awq + rtn, no clipping": {"rounding": "rtn", "clip": False},
    "awq + rtn": {"rounding": "rtn"},
    "gptq, no scaling, source inputs": {"scaling": "none", "propagate_error": False},
    "awq + gptq, source inputs, no clipping": {"propagate_error": False, "clip": False},
    "awq + gptq, source inputs": {"propagate_error": False},
    "awq + gptq, propagated, strength .25": {"propagate_strength": 0.25},
    "awq + gptq, propagated, strength .5": {},
    "awq + gptq, propagated, strength .75": {"propagate_strength": 0.75},
    "awq + gptq, propagated, strength 1": {"propagate_strength": 1.0},
    "awq + gptq, propagated, damp .01": {"damp_percent": 0.01},
    "awq + gptq, propagated, damp .1": {"damp_percent": 0.1},
}
QUICK = (
    "awq + rtn",
    "awq + gptq, source inputs",
    "awq + gptq, propagated, strength .5",
    "awq + gptq, propagated, strength .75",
)


def main() -> None:
    """Convert with every setting, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("heldout")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    source = resolve(options.model)
    tokenizer, config = load_tokenizer(source.path), load_config(source.path)
    text = {"samples": options.samples, "length": options.length}
    tokens = token_windows(TextSource(text=options.calibration, **text), tokenizer)
    windows = token_windows(TextSource(text=options.heldout, samples=64, length=options.length, seed=7), tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = tempfile.TemporaryDirectory(prefix="qtool-")
    model = load_model(Checkpoint.open(source.path).read(), config, device)
    reference = fidelity.make_reference(model, windows, Path(folder.name) / "source")
    print("| setting | mean KL | top-1 |\n|---|---|---|")
    for name, changes in SETTINGS.items():
        if options.quick and name not in QUICK:
            continue
        with tempfile.TemporaryDirectory() as folder:
            output = {"method": "awq", "group_size": options.group_size} | changes
            recipe = Recipe.model_validate({"model": options.model, "outputs": [output], "output_dir": folder})
            job = open_job(recipe, source, device, recipe.outputs)
            artifact = make_artifacts(job, recipe.outputs, CalibrationSet(tokens, options.calibration))["awq"]
            found = fidelity.diverge(load_model(artifact.read(), config, device), windows, reference)
        kl = bootstrap_mean(found.kl)
        top1 = sum(found.top1) / len(found.top1)
        print(f"| {name} | {kl.estimate:.4f} [{kl.low:.4f}, {kl.high:.4f}] | {top1:.2%} |", flush=True)


if __name__ == "__main__":
    main()
