"""Which strength of propagation, damping and clipping costs least: mean KL of many settings on one model in one run.

    python scripts/sweep_rounding.py MODEL CALIBRATION HELDOUT [--group-size N] [--samples N] [--length N] [--quick]

MODEL: a folder or `qtool-demo`; CALIBRATION and HELDOUT: texts as a recipe names them. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.source import resolve
from qtool.convert.skeleton import load_config
from qtool.convert.text.source import TextSource
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.text.windows import token_windows
from qtool.evaluate import fidelity
from qtool.evaluate.engines.torch_model import load_model, logits_of
from qtool.evaluate.statistics import bootstrap_mean
from qtool.make.job import open_job
from qtool.make.outputs import make_artifacts
from qtool.quantize.calibration import CalibrationSet
from qtool.recipe.sections import Recipe

# Every row spells out every key that it could leave to a default: a default that changes must not change what a row is.
RTN: dict[str, Any] = {
    "scaling": "none", "rounding": "rtn", "clip": False,
    "propagate_error": False, "propagate_strength": 0.25, "damp_percent": 0.05, "descent": False,
}  # fmt: skip
SOURCE = RTN | {"scaling": "awq", "rounding": "gptq", "clip": True}
OWN = SOURCE | {"propagate_error": True}
DESCENT = OWN | {"descent": True, "damp_percent": 0.1}
SETTINGS: dict[str, dict[str, Any]] = {
    "rtn, no scaling, no clipping": RTN,
    "awq + rtn, no clipping": RTN | {"scaling": "awq"},
    "awq + rtn": RTN | {"scaling": "awq", "clip": True},
    "gptq, no scaling, source inputs, damp .05": SOURCE | {"scaling": "none"},
    "awq + gptq, source inputs, no clipping, damp .05": SOURCE | {"clip": False},
    "awq + gptq, source inputs, damp .05": SOURCE,
    "awq + gptq, own inputs, strength .25, damp .05": OWN,
    "awq + gptq, own inputs, strength .25, damp .1": OWN | {"damp_percent": 0.1},
    "awq + gptq, own inputs, strength .5, damp .01": OWN | {"propagate_strength": 0.5, "damp_percent": 0.01},
    "awq + gptq, own inputs, strength .5, damp .05": OWN | {"propagate_strength": 0.5},
    "awq + gptq, own inputs, strength .5, damp .1": OWN | {"propagate_strength": 0.5, "damp_percent": 0.1},
    "awq + gptq, own inputs, strength .75, damp .05": OWN | {"propagate_strength": 0.75},
    "awq + gptq, own inputs, strength 1, damp .05": OWN | {"propagate_strength": 1.0},
    "awq + descent, strength .25, damp .1": DESCENT,
    "awq + descent, strength .35, damp .1": DESCENT | {"propagate_strength": 0.35},
    "awq + descent, strength .5, damp .1": DESCENT | {"propagate_strength": 0.5},
    "descent, no scaling, strength .35, damp .1": DESCENT | {"propagate_strength": 0.35, "scaling": "none"},
}
QUICK = (
    "awq + rtn",
    "awq + gptq, source inputs, damp .05",
    "awq + gptq, own inputs, strength .25, damp .1",
    "awq + gptq, own inputs, strength .5, damp .05",
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
    with tempfile.TemporaryDirectory(prefix="qtool-") as work:
        model = load_model(Checkpoint.open(source.path).read(), config, device)
        reference = fidelity.make_reference(logits_of(model), windows, Path(work) / "source")
        print("| setting | mean KL | top-1 |\n|---|---|---|")
        for name, keys in SETTINGS.items():
            if options.quick and name not in QUICK:
                continue
            made = Path(work) / name
            output = {"method": "awq", "group_size": options.group_size} | keys
            recipe = Recipe.model_validate({"model": options.model, "outputs": [output], "output_dir": str(made)})
            job = open_job(recipe, source, device, recipe.outputs)
            artifact = make_artifacts(job, CalibrationSet(tokens, options.calibration))["awq"]
            found = fidelity.diverge(logits_of(load_model(artifact.read(), config, device)), windows, reference)
            shutil.rmtree(made)
            kl = bootstrap_mean(found.kl)
            top1 = sum(found.top1) / len(found.top1)
            print(f"| {name} | {kl.estimate:.4f} [{kl.low:.4f}, {kl.high:.4f}] | {top1:.2%} |", flush=True)


if __name__ == "__main__":
    main()
