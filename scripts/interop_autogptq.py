#!/usr/bin/env python3
"""Unpack every linear of a GPTQ (version 1) artifact with AutoGPTQ's own code, and print what came out.

Runs in an environment of its own that holds AutoGPTQ (installed without its dependencies), torch, transformers and
safetensors; scripts/check_interop.py starts it. AutoGPTQ itself is not imported (it wants an old transformers): only
the modules that unpack, `qlinear_cuda_old.py` and, for act-order, `qlinear_cuda.py`, are loaded, unchanged. Their
forward of an identity matrix is the weight.

Prints one JSON object: linear -> {"shape": [out, in], "sha256": of the float32 weight, row by row}.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def load_linear(desc_act: bool) -> Any:
    """AutoGPTQ's class QuantLinear; the older module reads groups of neighbouring columns only."""
    package = importlib.util.find_spec("auto_gptq")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("AutoGPTQ is not installed here")
    name = "qlinear_cuda" if desc_act else "qlinear_cuda_old"
    file = Path(package.submodule_search_locations[0]) / "nn_modules" / "qlinear" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.QuantLinear


def unpack_linears(folder: Path, only: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, float32 weight [out, in]) of every linear."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits, kind = quantization["bits"], load_linear(quantization["desc_act"])
    places: dict[str, Path] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), shard))
    for key in sorted(places):
        name, _, suffix = key.rpartition(".")
        if suffix != "qweight" or only not in (None, name):
            continue
        parts = {}
        for suffix in PARTS:
            with safe_open(places[f"{name}.{suffix}"], framework="pt") as file:
                parts[suffix] = file.get_tensor(f"{name}.{suffix}")
        columns, out = parts["qweight"].shape[0] * 32 // bits, parts["qweight"].shape[1]
        linear = kind(bits, quantization["group_size"], columns, out, bias=False)
        for suffix, tensor in parts.items():
            setattr(linear, suffix, tensor.float() if suffix == "scales" else tensor)
        with torch.inference_mode():
            weight = linear(torch.eye(columns))
        yield name, (weight.t().contiguous() + 0.0)  # + 0.0: a negative zero becomes a plain one


def main() -> None:
    """Print the digests, or write one weight to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder of the artifact")
    parser.add_argument("--only", metavar="LINEAR", help="this linear only")
    parser.add_argument("--dump", type=Path, help="also write the weights to this .safetensors file")
    args = parser.parse_args()
    digests, dump = {}, {}
    for name, weight in unpack_linears(args.artifact, args.only):
        digest = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
        digests[name] = {"shape": list(weight.shape), "sha256": digest}
        if args.dump:
            dump[name] = weight
    if args.dump:
        save_file(dump, args.dump)
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
