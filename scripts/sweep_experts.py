"""How experts' statistics should be taken: KL to the source of AWQ and GPTQ under each way, on a mixture of experts.

    python scripts/sweep_experts.py MODEL CALIBRATION HELDOUT [--samples N] [--length N] [--group-size N] [--seeds N]
        [--gguf]  Q4_K_M by descent and by ggml's own search instead

MODEL: a folder (scripts/train_small_experts.py makes one); CALIBRATION and HELDOUT: texts as a recipe names them. The
layers are quantized in memory, nothing is written. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.config_file import read_config
from qtool.convert.files.source import resolve
from qtool.convert.formats.plan import ModelShape
from qtool.convert.models.shape import decoder_of
from qtool.convert.skeleton import build_skeleton, load_config
from qtool.convert.text.source import TextSource
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.text.windows import token_windows
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.gguf import GgufMethod
from qtool.quantize.methods.gptq import GptqMethod
from qtool.quantize.methods.method import Method
from qtool.quantize.routed import ExpertSettings, RoutedStatistics
from qtool.quantize.walk import Column, Walk

ALL = 1e9  # blended with all tokens however many an expert has: no statistics of its own
NONE = "no statistics of experts"  # every input channel of an expert counts alike
WAYS: dict[str, ExpertSettings] = {
    NONE: ExpertSettings(exponent=0, blend=0),
    "all tokens to every expert": ExpertSettings.model_construct(exponent=0, blend=ALL),
    "own tokens, p^0, no blend": ExpertSettings(exponent=0, blend=0),
    "own tokens, p^2, no blend": ExpertSettings(exponent=2, blend=0),
    "own tokens, p^0, blend 1": ExpertSettings(exponent=0, blend=1),
    "own tokens, p^1, blend 1": ExpertSettings(exponent=1, blend=1),
    "own tokens, p^2, blend 1": ExpertSettings(exponent=2, blend=1),
    "own tokens, p^2, blend 4": ExpertSettings(exponent=2, blend=4),
}


class Subject:
    """A source model, and what its quantized layers cost."""

    def __init__(self, folder: str, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        source = resolve(folder)
        self.path, self.device = source.path, device
        self.tokenizer = load_tokenizer(source.path)
        self.model: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).to(device).eval()
        self.checkpoint, self.raw = Checkpoint.open(source.path), read_config(source.path)
        self.decoder = decoder_of(self.raw)

    def windows(self, text: str, samples: int, length: int, seed: int = 0) -> Tensor:
        """Tokens ``[samples, length]``."""
        return token_windows(TextSource(text=text, samples=samples, length=length, seed=seed), self.tokenizer)

    def quantized(self, methods: list[Method], tokens: Tensor, settings: ExpertSettings) -> dict[str, dict[str, Any]]:
        """Method's name -> the model's layers as a reader of the artifact gets them, and the records."""
        skeleton = build_skeleton(load_config(self.path))
        shape = ModelShape(self.checkpoint.tensors, self.decoder, self.raw)
        columns = [Column(method, method.container.plan(shape)) for method in methods]
        calibration = CalibrationSet(tokens, "sweep")
        walk = Walk(skeleton, self.decoder, self.checkpoint, calibration, columns, self.device, settings)
        states: dict[str, dict[str, Any]] = {method.name: {} for method in methods}
        for result in walk.run():
            for name, made in result.outputs.items():
                state = made.dequantized(torch.float32, torch.float16, self.decoder.family.casts)
                states[name][f"{result.index}"] = (self.decoder.in_memory(state), made.records)
        return states

    def logits(self, windows: Tensor, layers: Mapping[str, Any] | None = None) -> Tensor:
        """Log-probabilities of the source, or of it with other layers."""
        own = [dict(layer.state_dict()) for layer in self.model.model.layers]
        for index, (state, _) in (layers or {}).items():
            self.model.model.layers[int(index)].load_state_dict(
                {name: tensor.to(self.device) for name, tensor in state.items()}, assign=True
            )
        with torch.inference_mode():
            parts = [self.model(input_ids=part.to(self.device)).logits.log_softmax(-1) for part in windows.split(8)]
        for layer, state in zip(self.model.model.layers, own, strict=True):
            layer.load_state_dict(state, assign=True)
        return torch.cat(parts)


def main() -> None:
    """Quantize in every way, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("heldout")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128))
    parser.add_argument("--seeds", type=int, default=1, help="calibration sets, of other windows each; means are shown")
    parser.add_argument("--gguf", action="store_true", help="Q4_K_M in place of AWQ and GPTQ")
    options = parser.parse_args()
    subject = Subject(options.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    sets = [
        subject.windows(options.calibration, options.samples, options.length, seed) for seed in range(options.seeds)
    ]
    windows = subject.windows(options.heldout, 48, options.length, seed=7)
    expected = subject.logits(windows)
    size = options.group_size
    methods = _gguf() if options.gguf else _uniform(size)
    plain = AwqMethod(method="awq", name="rtn", group_size=size, scaling="none", rounding="rtn", clip=False)
    cost = cost_of(subject, subject.quantized([plain], sets[0], ExpertSettings()), windows, expected)["rtn"]
    print(
        f"{options.seeds} x {sets[0].numel()} tokens of calibration, {windows.numel()} held out; KL in nats a token\n"
    )
    names = " | ".join(method.name for method in methods)
    print(f"| statistics | {names} | experts' tokens, least and mean | blended |")
    print("|---|" + "---|" * (len(methods) + 2))
    print(f"| round to nearest, none | {cost:.5f} | | | |", flush=True)
    for name, settings in WAYS.items():
        costs, records = list[dict[str, float]](), list[dict[str, float]]()
        for tokens in sets:
            with _blind() if name == NONE else nullcontext():
                states = subject.quantized(methods, tokens, settings)
            costs.append(cost_of(subject, states, windows, expected))
            records += [
                record for _, held in states[methods[0].name].values() for record in held.values() if "tokens" in record
            ]
        counts, blended = [record["tokens"] for record in records], sum(record["blended"] > 0 for record in records)
        columns = " | ".join(f"{fmean(cost[method.name] for cost in costs):.5f}" for method in methods)
        reached = f"{min(counts):.0f}, {fmean(counts):.0f}"
        print(f"| {name} | {columns} | {reached} | {100 * blended // len(records)} % |", flush=True)


def _uniform(size: Literal[32, 64, 128]) -> list[Method]:
    return [AwqMethod(method="awq", group_size=size), GptqMethod(method="gptq", group_size=size)]


def _gguf() -> list[Method]:
    return [
        GgufMethod(method="gguf"),
        GgufMethod(method="gguf", name="grams", propagate_error=False),
        GgufMethod(method="gguf", name="ggml", rounding="ggml"),
    ]


@contextmanager
def _blind() -> Iterator[None]:
    """While open, experts are rounded as if their inputs were uncorrelated, of one size, and had not drifted."""
    original = RoutedStatistics.finish

    def finish(stats: RoutedStatistics, typical: Callable[[int], Tensor]) -> None:
        original(stats, typical)
        size = stats.gram.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
        stats.gram.copy_(torch.eye(stats.gram.shape[-1], device=size.device) * size)
        stats.abs_sum.copy_(stats.mass.unsqueeze(1).expand_as(stats.abs_sum))
        if stats.drift is not None:
            stats.drift.zero_()

    RoutedStatistics.finish = finish  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        RoutedStatistics.finish = original  # type: ignore[method-assign]


def cost_of(
    subject: Subject, states: Mapping[str, Mapping[str, Any]], windows: Tensor, expected: Tensor
) -> dict[str, float]:
    """Mean KL of the next-token distributions to the source's."""
    found = {}
    for name, layers in states.items():
        difference = expected - subject.logits(windows, layers)
        found[name] = float((expected.exp() * difference).sum(-1).mean())
    return found


if __name__ == "__main__":
    main()
