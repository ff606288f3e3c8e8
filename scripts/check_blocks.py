"""Whether llama.cpp's blocks that an accelerator makes are those of ggml's own C code, byte for byte.

    python scripts/check_blocks.py                # every type that is made on the accelerator
    python scripts/check_blocks.py --rows 4096 --only Q2_K IQ4_XS

Weights are drawn to be hard in different ways: normal ones, heavy tails, rows of zeros and constants among them, tiny
and large scales; importance rows are level, of six decades, and with zeros. A line for each type: the weights that were
rounded, the bytes that differ, and the seconds of the second call (the first compiles). Needs a CUDA device, Triton,
and a package with ggml in it (xllamacpp). 1 where a byte differs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from qtool.quantize.methods import kquants, low_bits
from qtool.quantize.methods.ggml import quantize_ggml

COLUMNS = 2048
KINDS = ("normal", "tails", "odd rows", "tiny", "large")


def weights_of(kind: str, rows: int) -> Tensor:
    """float32 ``[rows, COLUMNS]``."""
    normal = torch.randn(rows, COLUMNS)
    if kind == "tails":
        return normal * torch.exp(1.5 * torch.randn(rows, COLUMNS))
    if kind == "odd rows":
        normal[::7] = 0
        normal[1::7] = 0.5
        normal[2::7, ::3] = 0
        normal[3::7] = normal[3::7].abs()
        return normal
    return normal * {"normal": 0.02, "tiny": 1e-6, "large": 500.0}[kind]


def importance_rows() -> Iterator[tuple[str, Tensor | None]]:
    """Name -> float32 ``[COLUMNS]``, or None for none."""
    yield "none", None
    yield "level", torch.ones(COLUMNS)
    wide = torch.exp(2.5 * torch.randn(COLUMNS))
    yield "wide", wide
    yield "with zeros", torch.where(torch.rand(COLUMNS) < 0.2, 0.0, wide)


def compared(type_name: str, rows: int) -> int:
    """Print the type's line. The bytes that differ."""
    differing, seconds, rounded, where = 0, 0.0, 0, []
    for kind in KINDS:
        weight = weights_of(kind, rows)
        for said, importance in importance_rows():
            if importance is None and type_name in low_bits.TYPES:
                continue  # made by the C code itself
            expected = quantize_ggml(weight, type_name, importance).data
            on_card = weight.cuda()
            row = None if importance is None else importance.cuda()
            for _ in range(2):
                torch.cuda.synchronize()
                begun = time.monotonic()
                found = quantize_ggml(on_card, type_name, row).data
                torch.cuda.synchronize()
                last = time.monotonic() - begun
            unlike = int((found.cpu() != expected).sum())
            differing, seconds, rounded = differing + unlike, seconds + last, rounded + weight.numel()
            where += [f"{kind}, importance {said}: {unlike}"] * bool(unlike)
    said = f"{type_name:7} {rounded / 1e6:7.1f} M weights {differing:9} bytes differ {seconds:7.3f} s"
    print(said, *where, sep="; ", flush=True)
    return differing


def main() -> int:
    """A line for each type; 1 where a byte differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made = (*kquants.TYPES, *low_bits.TYPES)
    parser.add_argument("--only", nargs="+", choices=made, default=list(made))
    parser.add_argument("--rows", type=int, default=512)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(torch.__version__, torch.cuda.get_device_name())
    return int(sum(compared(type_name, options.rows) for type_name in options.only) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
