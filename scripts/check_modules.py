#!/usr/bin/env python3
"""Outputs that keep some linears in 16 bits, or give some their own settings, by hand or by a budget, where they are
loaded: each runtime has its own way of being told, and one that is not told loads noise.

The outputs are made of the demo model. Every runtime's answers are held against qtool's own reading of the folder
(codes dequantized, float32). transformers loads NF4 and compressed-tensors here. vLLM loads all in an environment of
its own (--vllm; docs/vllm.md says how to make one), transformers with GPTQModel and optimum loads AWQ and GPTQ in
another (--gptqmodel; scripts/check_interop.py makes it). tests/test_modules.py asks llama.cpp.

Exit codes: 0 all agrees, 1 something does not, 2 wrong input, 3 no vLLM.

Example:
  python scripts/check_modules.py --vllm vllm-cpu/bin/python
  python scripts/check_modules.py --vllm vllm-cpu/bin/python --only budget
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from check_vllm import Case, ask, judge, prompts_of, reference_of
from peer_environments import run_child
from safetensors.torch import load_file, save_file
from vllm_table import read_rows

import qtool
from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.source import resolve

MODEL = "qtool-demo"
TEXT = {"text": "qtool-code", "samples": 32, "length": 128}
# |difference of log-probabilities| on average, nats, of right weights in these runtimes' own arithmetic
LIMIT = 0.05
OUTPUTS: tuple[dict[str, Any], ...] = (
    {"method": "awq", "name": "awq", "group_size": 32, "ignore": ["down_proj", "model.layers.0.self_attn.*"]},
    {"method": "gptq", "name": "gptq-ignore", "group_size": 32, "ignore": ["mlp.*"]},
    {"method": "gptq", "name": "gptq-groups", "group_size": 64, "modules": {"down_proj": {"group_size": 32},
     "model.layers.1.self_attn.*": {"group_size": 32}}, "ignore": ["model.layers.0.mlp.gate_proj",
     "model.layers.0.mlp.up_proj"]},
    {"method": "gptq", "name": "gptq-awq", "group_size": 32, "scaling": "awq", "ignore": ["self_attn.*"]},
    {"method": "gptq", "name": "gptq-8", "group_size": 64, "modules": {"down_proj": {"bits": 8}}},
    {"method": "gptq", "name": "ct", "format": "compressed-tensors", "group_size": 64, "ignore": ["o_proj"],
     "modules": {"model.layers.1.mlp.*": {"group_size": 32}}},
    {"method": "gptq", "name": "ct-8", "format": "compressed-tensors", "group_size": 64,
     "modules": {"down_proj": {"bits": 8, "group_size": 32}}},
    {"method": "nf4", "name": "nf4", "ignore": ["self_attn.*"]},
    {"method": "awq", "name": "budget-awq", "group_size": 32, "descent": False, "budget": {"target_bpw": 9}},
    {"method": "gptq", "name": "budget-gptq", "descent": False, "budget": {"target_bpw": 7.5}},
    {"method": "gptq", "name": "budget-ct", "format": "compressed-tensors", "descent": False,
     "budget": {"target_bpw": 7.5}},
    {"method": "nf4", "name": "budget-nf4", "rounding": "absmax", "budget": {"target_bpw": 9}},
)  # fmt: skip


def distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean |difference| of log-probabilities over the tokens that the reference gives at least e^-8."""
    ours, theirs = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    likely = ours > -8
    return float((ours - theirs).abs()[likely].mean())


def in_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits as a user of transformers gets them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits


def in_gptqmodel(python: Path, folder: Path, tokens: torch.Tensor, work: Path) -> torch.Tensor:
    """Logits from transformers with GPTQModel's plain kernels, in its own environment."""
    backend = "torch_awq" if Artifact.open(folder).quantization["quant_method"] == "awq" else "torch"
    save_file({"tokens": tokens}, work / "tokens.safetensors")
    arguments = ("--tokens", work / "tokens.safetensors", "--out", work / "logits.safetensors")
    run_child(python, "interop_gptqmodel.py", folder, *arguments, "--run", f"{backend}:float32", scratch=work)
    logits: torch.Tensor = load_file(work / "logits.safetensors")[f"{backend}:float32"]
    return logits


def here(folders: dict[str, Path], tokens: torch.Tensor, gptqmodel: Path | None, work: Path) -> Iterator[str]:
    """What differs in the runtimes other than vLLM."""
    asked = dict.fromkeys(("ct", "ct-8", "nf4", "budget-ct", "budget-nf4"), "transformers")
    if gptqmodel is not None:
        asked |= dict.fromkeys(("awq", "gptq-ignore", "gptq-awq"), "transformers with GPTQModel")
    for name, runtime in asked.items():
        if name not in folders:
            continue
        reference = reference_of(folders[name])
        with torch.inference_mode():
            expected = reference(tokens).logits
        if gptqmodel is not None and "GPTQModel" in runtime:
            logits = in_gptqmodel(gptqmodel, folders[name], tokens, work)
        else:
            logits = in_transformers(folders[name], tokens)
        far = distance(logits, expected)
        print(f"{name:12} {runtime}: {far:.4f} nats")
        if not far <= LIMIT:
            yield f"{name} in {runtime}: {far:.4f} nats from qtool's reading"


def in_vllm(python: str, folders: dict[str, Path], work: Path) -> Iterator[str]:
    """What differs in vLLM."""
    cases = [Case(name, folder, ("float16",), folder) for name, folder in folders.items()]
    prompts = prompts_of(MODEL)
    for row in judge(cases, prompts, read_rows(ask(python, cases, prompts, {}, work))):
        print(f"{row.label:12} vLLM: {row.verdict} {row.distance if row.distance is not None else ''} {row.kernels}")
        if not row.agrees:
            yield f"{row.label} in vLLM: {row.verdict}: {row.kernels}"


def check(vllm: str | None, gptqmodel: Path | None, work: Path, only: str = "") -> int:
    """Make, verify, ask, compare. ``only``: outputs whose names begin so."""
    outputs = [one for one in OUTPUTS if one["name"].startswith(only)]
    made = qtool.convert(MODEL, outputs, TEXT, folder=work / "artifacts")
    folders = {name: artifact.path for name, artifact in made.items()}
    source = resolve(MODEL).path
    faults = []
    for name, folder in folders.items():
        looked = qtool.verify(folder, source)
        faults += [
            f"{name}: {one.name}: {one.detail}" for one in looked.checks if one.required and one.status == "fail"
        ]
    tokens = torch.tensor([row[:48] for row in prompts_of(MODEL) if len(row) >= 48][:8])
    faults += here(folders, tokens, gptqmodel, work)
    if vllm:
        faults += in_vllm(vllm, folders, work)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and exit with the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="Python of an environment with vLLM")
    parser.add_argument("--gptqmodel", type=Path, help="Python of an environment with transformers and GPTQModel")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep all here")
    parser.add_argument("--only", default="", metavar="NAME", help="outputs whose names begin so")
    args = parser.parse_args(arguments)
    try:
        if args.work:
            args.work.mkdir(parents=True, exist_ok=True)
            raise SystemExit(check(args.vllm, args.gptqmodel, args.work.resolve(), args.only))
        with tempfile.TemporaryDirectory() as work:
            raise SystemExit(check(args.vllm, args.gptqmodel, Path(work), args.only))
    except QtoolError as error:
        print(error.message, file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
