"""Mean KL to the source of several artifacts, qtool's and other tools', on the same held-out text in one run.

    python scripts/bench_fidelity.py BENCH SOURCE NAME=DIR [NAME=DIR ...] [--samples 64] [--length 512] [--against NAME]

Prints a Markdown table; with --against, each row's KL as a ratio to that row with a paired bootstrap interval.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch

from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.skeleton import load_config
from qtool.convert.text.source import TextSource
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.text.windows import token_windows
from qtool.evaluate import fidelity
from qtool.evaluate.engines.torch_model import load_model, logits_of
from qtool.evaluate.statistics import bootstrap_mean, bootstrap_ratio


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("artifacts", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--against")
    parser.add_argument("--kept", type=int, help="source tokens kept at a position (default: all, so that KL is exact)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = TextSource(text=str(options.bench / "heldout.jsonl"), samples=options.samples, length=options.length, seed=7)
    windows = token_windows(text, load_tokenizer(options.source))
    config = load_config(options.source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(Checkpoint.open(options.source).read(), config, device)
    scratch = tempfile.TemporaryDirectory(prefix="qtool-")
    kept = options.kept or config.vocab_size
    source = fidelity.make_reference(logits_of(model), windows, Path(scratch.name) / "source", kept=kept)
    found = {"source": fidelity.diverge(logits_of(model), windows, source)}
    for item in options.artifacts:
        name, folder = item.split("=", 1)
        model = load_model(Artifact.open(Path(folder)).read(), config, device)
        found[name] = fidelity.diverge(logits_of(model), windows, source)
    print(f"| model | perplexity | KL | p99.9 | top-1 |{' KL ratio |' if options.against else ''}")
    print("|---|---|---|---|---|" + ("---|" if options.against else ""))
    for name, figures in found.items():
        kl = bootstrap_mean(figures.kl)
        perplexity = math.exp(sum(figures.nll) / len(figures.nll))
        row = f"| {name} | {perplexity:.3f} | {kl.estimate:.4f} [{kl.low:.4f}, {kl.high:.4f}]"
        row += f" | {figures.kl_p999:.3f} | {sum(figures.top1) / len(figures.top1):.3%} |"
        if options.against and name != "source":
            ratio = bootstrap_ratio(figures.kl, found[options.against].kl)
            row += f" {ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] |"
        print(row)


if __name__ == "__main__":
    main()
