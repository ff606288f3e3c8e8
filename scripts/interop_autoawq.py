#!/usr/bin/env python3
"""Unpack every linear of an AWQ artifact with AutoAWQ's own code, and print what came out.

Runs in an environment of its own that holds AutoAWQ (installed without its dependencies), torch and
safetensors; scripts/check_interop.py starts it. AutoAWQ itself is not imported (its `__init__` wants triton
and an old transformers): only the module that unpacks, `awq/utils/packing_utils.py`, is loaded, unchanged.

Prints one JSON object: linear -> {"shape": [out, in], "sha256": of the float16 weight, row by row}.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def load_dequantize() -> Callable[..., torch.Tensor]:
    """Return AutoAWQ's `dequantize_gemm(qweight, qzeros, scales, bits, group_size)` -> float16 [in, out]."""
    package = importlib.util.find_spec("awq")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("AutoAWQ is not installed here")
    file = Path(package.submodule_search_locations[0]) / "utils" / "packing_utils.py"
    spec = importlib.util.spec_from_file_location("packing_utils", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dequantize: Callable[..., torch.Tensor] = module.dequantize_gemm
    return dequantize


def locate_tensors(folder: Path) -> dict[str, Path]:
    """Map every tensor's name to the shard that holds it."""
    places: dict[str, Path] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), shard))
    return places


def unpack_linears(folder: Path, only: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, float16 weight [out, in]) of every linear; scales become float16, as in AutoAWQ."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    dequantize = load_dequantize()
    places = locate_tensors(folder)
    for key in sorted(places):
        name, _, suffix = key.rpartition(".")
        if suffix != "qweight" or only not in (None, name):
            continue
        parts = {}
        for suffix in ("qweight", "qzeros", "scales"):
            with safe_open(places[f"{name}.{suffix}"], framework="pt") as file:
                parts[suffix] = file.get_tensor(f"{name}.{suffix}")
        group_size = quantization["group_size"]
        if group_size == -1:
            group_size = parts["qweight"].shape[0]
        weight = dequantize(parts["qweight"], parts["qzeros"], parts["scales"].half(), quantization["bits"], group_size)
        if weight.dtype != torch.float16:
            raise SystemExit(f"{name}: AutoAWQ made {weight.dtype}, expected torch.float16")
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
