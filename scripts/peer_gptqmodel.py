#!/usr/bin/env python3
"""Quantize a local model folder with GPTQModel, on the very calibration tokens that qtool used.

Run it with the Python of an environment that holds GPTQModel, not with qtool's own (GPTQModel pins its own
numpy). Seen with GPTQModel 7.6.0, transformers 5.23, torch 2.13 on a CPU with 2 cores. It prints one JSON
object on standard output: wall seconds (loading and quantization apart), peak resident memory, versions.

What this script has to know about GPTQModel on a CPU:
- below 3 pool workers it deadlocks or crashes on 2 cores, so GPTQMODEL_CPU_WORKERS=3 is set unless given;
- AWQ quantizes only with backend=AWQ_TORCH (the default packs through a GPU kernel);
- its AWQConfig is symmetric unless told otherwise, while everybody's AWQ GEMM kernels expect zero points;

Example: PEER/bin/python scripts/peer_gptqmodel.py models/smollm2 --method awq --tokens tokens.safetensors \\
             --out peer-awq
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "3")  # read when gptqmodel is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
KIB_PER_GIB = 2**20


def read_tokens(path: Path, limit: int | None) -> list[list[int]]:
    """Read token ids [sequences, length] from a .npy file, or from key `tokens` of a .safetensors file."""
    import numpy
    from safetensors.numpy import load_file

    if path.suffix == ".npy":
        tokens = numpy.load(path, allow_pickle=False)
    else:
        tensors = load_file(path)
        if "tokens" not in tensors:
            raise SystemExit(f"{path}: no tensor named 'tokens' (found {', '.join(sorted(tensors))})")
        tokens = tensors["tokens"]
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise SystemExit(f"{path}: expected integers [sequences, length], found {tokens.dtype} {tokens.shape}")
    rows: list[list[int]] = tokens[:limit].tolist()
    return rows


def make_config(method: str, bits: int, group_size: int) -> Any:
    """Build GPTQModel's own configuration: its defaults, but asymmetric AWQ, and GPTQ without act-order."""
    from gptqmodel.quantization import AWQConfig, GPTQConfig

    if method == "awq":
        return AWQConfig(bits=bits, group_size=group_size, sym=False, device="cpu")
    return GPTQConfig(bits=bits, group_size=group_size, sym=True, desc_act=False, device="cpu")


def allow_float32_awq() -> None:
    """Let AWQ's forward run in float32: the packing kernel's list of dtypes refuses it, its `pack` can do it.

    The stored scales become float16 then, as AutoAWQ's are.
    """
    import torch
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    AwqTorchLinear.SUPPORTS_DTYPES = [*AwqTorchLinear.SUPPORTS_DTYPES, torch.float32]


def replace_clip_search() -> None:
    """Give AWQ's clip search a matrix product where GPTQModel multiplies element by element and sums.

    Same tokens, same grid, same quantizer, same error (mean over tokens of the squared change of each group's
    part of the output), summed in another order: for runs that want the result, not GPTQModel's own speed.
    """
    import torch
    from gptqmodel.looper.awq_processor import AWQProcessor

    def search(self: Any, w: Any, input_feat: Any, n_grid: int = 20, max_shrink: float = 0.5) -> Any:
        group_size = self.qcfg.group_size if self.qcfg.group_size > 0 else w.shape[1]
        x = input_feat.reshape(-1, w.shape[1])
        x = x[:: max(1, x.shape[0] // 512)].float().view(-1, w.shape[1] // group_size, group_size)
        gram = torch.einsum("tgi,tgj->gij", x, x) / x.shape[0]
        w = w.reshape(w.shape[0], -1, group_size)  # [out, groups, group_size]
        largest = w.abs().amax(dim=-1, keepdim=True)
        best, least = largest.clone(), torch.full_like(largest, 1e9, dtype=torch.float32)
        quantized = torch.empty_like(w)
        for step in range(int(max_shrink * n_grid)):
            bound = largest * (1 - step / n_grid)
            self._pseudo_quantize_tensor_into(torch.clamp(w, -bound, bound), quantized)
            change = (quantized - w).float()
            projected = torch.bmm(change.transpose(0, 1), gram).transpose(0, 1)
            error = (projected * change).sum(-1, keepdim=True)
            better = error < least
            least[better], best[better] = error[better], bound[better]
        return best

    AWQProcessor._compute_best_clip = torch.inference_mode()(search)


def quantize(args: argparse.Namespace) -> dict[str, Any]:
    """Load, quantize and save; return the measurements."""
    started = time.perf_counter()
    import torch
    from gptqmodel import BACKEND, GPTQModel

    if args.threads:
        torch.set_num_threads(args.threads)
    rows = read_tokens(args.tokens, args.sequences)
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    imported = time.perf_counter()
    if args.method == "awq" and args.dtype == "float32":
        allow_float32_awq()
    if args.fast_clip:
        replace_clip_search()
    config = make_config(args.method, args.bits, args.group_size)
    model = GPTQModel.load(str(args.model), config, dtype=getattr(torch, args.dtype, args.dtype))
    loaded = time.perf_counter()
    backend = BACKEND.AWQ_TORCH if args.method == "awq" else BACKEND.AUTO
    model.quantize(calibration, batch_size=args.batch_size, backend=backend)
    quantized = time.perf_counter()
    model.save(str(args.out))
    saved = time.perf_counter()
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    packages = ("gptqmodel", "torch", "transformers", "numpy")
    return {
        "method": args.method,
        "bits": args.bits,
        "group_size": args.group_size,
        "sequences": len(rows),
        "length": len(rows[0]),
        "import_s": round(imported - started, 2),
        "load_s": round(loaded - imported, 2),
        "quantize_s": round(quantized - loaded, 2),
        "save_s": round(saved - quantized, 2),
        "wall_s": round(saved - started, 2),
        "peak_rss_gib": round(peak / KIB_PER_GIB, 3),
        "dtype": args.dtype,
        "fast_clip": args.fast_clip,
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="source folder: config.json, safetensors, tokenizer")
    parser.add_argument("--method", choices=("awq", "gptq"), required=True)
    parser.add_argument(
        "--tokens",
        type=Path,
        required=True,
        help="token ids [sequences, length]: .npy, or .safetensors with the key `tokens`",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1, help="sequences in one forward")
    parser.add_argument("--sequences", type=int, help="use only the first so many sequences")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="dtype of the forward (default: the checkpoint's; float32 is about 8 times faster on processors "
        "without bfloat16 instructions)",
    )
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    parser.add_argument(
        "--fast-clip", action="store_true", help="AWQ: the same clip search by matrix products (see the code)"
    )
    args = parser.parse_args()
    for path in (args.model / "config.json", args.tokens):
        if not path.is_file():
            parser.error(f"{path}: no such file")
    if args.out.exists():
        parser.error(f"{args.out}: exists")
    return args


def main() -> None:
    """Quantize; what GPTQModel prints goes to standard error, the JSON result to standard output."""
    args = parse_arguments()
    with contextlib.redirect_stdout(sys.stderr):
        result = quantize(args)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
