#!/usr/bin/env python3
"""Load an AWQ or GPTQ artifact with transformers and GPTQModel on the CPU, and write its logits to a file.

Runs in an environment of its own (GPTQModel pins numpy); scripts/check_interop.py starts it. The loading
call is the user's: `AutoModelForCausalLM.from_pretrained(folder)`. Kernels seen on a CPU with GPTQModel 7.6:

- `auto` picks TorchAten*Linear: PyTorch's int4pack matmul, which rounds scales and zero offsets to bfloat16
  and multiplies in bfloat16, whatever the model's dtype;
- `torch_awq` / `torch` multiply by the float16 weight that the codes stand for.

Prints one JSON object: run -> what was loaded; writes one float32 tensor [batch, length, vocabulary] for each
run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "3")  # fewer crash on machines with 2 cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def run_model(folder: Path, backend: str, dtype: str, tokens: Any) -> tuple[Any, dict[str, Any]]:
    """Load `folder` with one kernel choice; return float32 logits and a description of what was loaded."""
    import torch
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if backend != "auto":
        method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
        # Only the kernel is taken from here: everything else still comes from the artifact's config.json.
        options["quantization_config"] = (
            AwqConfig(backend=backend) if method == "awq" else GPTQConfig(bits=4, backend=backend)
        )
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model.eval()
    with torch.inference_mode():
        logits = model(tokens, use_cache=False).logits.float()
    kernels = Counter(type(module).__name__ for module in model.modules() if hasattr(module, "qweight"))
    faults = {key: sorted(map(str, value)) for key, value in info.items() if value}
    return logits, {"dtype": str(model.dtype), "kernels": dict(kernels), "loading": faults}


def main() -> None:
    """Run each kernel choice; what the libraries print goes to standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder of the artifact")
    parser.add_argument("--tokens", type=Path, required=True, help=".safetensors with int64 `tokens`")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors to write")
    parser.add_argument("--run", action="append", required=True, metavar="BACKEND:DTYPE", help="as auto:auto")
    args = parser.parse_args()
    described: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr):
        from safetensors.torch import load_file, save_file

        tokens = load_file(args.tokens)["tokens"]
        logits = {}
        for run in args.run:
            backend, _, dtype = run.partition(":")
            logits[run], described[run] = run_model(args.artifact, backend, dtype, tokens)
        save_file(logits, args.out)
    packages = ("gptqmodel", "transformers", "torch")
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({"runs": described, "versions": versions}))


if __name__ == "__main__":
    main()
