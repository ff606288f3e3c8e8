"""A mixture of experts quantized by qtool and by llm-compressor on the same tokens: KL to the source, one judge.

    python scripts/compare_llmcompressor.py MODEL CALIBRATION HELDOUT --python PEER/bin/python
        [--samples N] [--length N] [--group-size N] [--seeds N]

MODEL, CALIBRATION, HELDOUT: as sweep_experts.py. PEER: an environment with `pip install torch==2.13.0 llmcompressor`.
AWQ is asymmetric, GPTQ symmetric in both. llm-compressor takes one to three minutes an output on a processor.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sweep_experts import Subject, cost_of
from torch import Tensor

from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.gptq import GptqMethod
from qtool.quantize.routed import ExpertSettings

PACKED, SHAPE, SCALE, ZERO = ".weight_packed", ".weight_shape", ".weight_scale", ".weight_zero_point"


def unpack(packed: Tensor, columns: int) -> Tensor:
    """int32 ``[rows, columns / 8]``, the first value in the low bits -> signed 4-bit values as float32."""
    values = (packed.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    return values.flatten(1)[:, :columns].float() - 8


def dequantized(folder: Path) -> dict[str, Tensor]:
    """Every weight of a pack-quantized checkpoint, float32."""
    stored = load_file(folder / "model.safetensors")
    found = {}
    for name, tensor in stored.items():
        module = name.removesuffix(PACKED)
        if module == name:
            if not name.endswith((SHAPE, SCALE, ZERO)):
                found[name] = tensor.float()
            continue
        rows, columns = stored[module + SHAPE].tolist()
        scale = stored[module + SCALE].float()
        zero = torch.zeros_like(scale)
        if (packed := stored.get(module + ZERO)) is not None:
            zero = unpack(packed.t(), rows).t()
        size = columns // scale.shape[1]
        codes = unpack(tensor, columns) - zero.repeat_interleave(size, 1)
        found[f"{module}.weight"] = codes * scale.repeat_interleave(size, 1)
    return found


def layers_of(subject: Subject, state: dict[str, Tensor]) -> dict[str, Any]:
    """As `Subject.logits` takes them."""
    found: dict[str, Any] = {}
    for index in range(len(subject.model.model.layers)):
        at = subject.decoder.at(index)
        own = {name.removeprefix(at): tensor for name, tensor in state.items() if name.startswith(at)}
        found[f"{index}"] = (subject.decoder.in_memory(own), {})
    return found


def main() -> None:
    """Quantize by both, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("heldout")
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128))
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    subject, size = Subject(options.model, torch.device("cpu")), options.group_size
    windows = subject.windows(options.heldout, 48, options.length, seed=7)
    expected = subject.logits(windows)
    source = {name: subject.checkpoint.tensor(name).float() for name in subject.checkpoint.tensors}
    assert cost_of(subject, {"source": layers_of(subject, source)}, windows, expected)["source"] == 0
    print("| tokens | AWQ | llm-compressor | GPTQ | llm-compressor |\n|---|---|---|---|---|")
    for seed in range(options.seeds):
        tokens = subject.windows(options.calibration, options.samples, options.length, seed)
        methods = [AwqMethod(method="awq", group_size=size), GptqMethod(method="gptq", group_size=size)]
        states: dict[str, Any] = subject.quantized([*methods], tokens, ExpertSettings())
        with tempfile.TemporaryDirectory() as folder:
            torch.save(tokens, f"{folder}/tokens.pt")
            for kind in ("awq", "gptq"):
                out, peer = Path(folder) / kind, Path(__file__).with_name("peer_llmcompressor.py")
                command = [options.python, "-I", peer, subject.path, f"{folder}/tokens.pt", out, kind, size]
                subprocess.run([*map(str, command)], check=True, stdout=sys.stderr, cwd=folder)
                states[f"peer {kind}"] = layers_of(subject, dequantized(out))
        cost = cost_of(subject, states, windows, expected)
        row = " | ".join(f"{cost[name]:.5f}" for name in ("awq", "peer awq", "gptq", "peer gptq"))
        print(f"| {tokens.numel():,}, set {seed} | {row} |", flush=True)


if __name__ == "__main__":
    main()
