"""What writing and verifying a layer takes of a processor: random codes of 8B geometry, packed, written, read back and
compared, then looked at as `qtool verify` does.

    nice python scripts/bench_writing.py [--threads 2]

Seconds of processor time (which other work disturbs little) and of the clock, for the seven matrices of a layer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.shards import open_shards
from qtool.convert.files.workers import workers
from qtool.convert.formats import autoawq, autogptq, bnb_nf4, compressed_tensors
from qtool.convert.formats.codes import Codes, Nf4Blocks, UniformCodes
from qtool.convert.formats.gguf.ggml import BLOCKS, GgmlBlocks
from qtool.convert.formats.linears import Linears
from qtool.convert.formats.table import Container
from qtool.convert.verify.tensors import see_codes

SHAPES = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
GROUP = 128


def uniform(out: int, columns: int) -> UniformCodes:
    """Random ones."""
    groups = out, columns // GROUP
    code, zero = (torch.randint(0, 16, size, dtype=torch.uint8) for size in ((out, columns), groups))
    return UniformCodes(code, torch.rand(groups).add_(0.1).half(), zero, 4, GROUP)


def nf4(out: int, columns: int) -> Nf4Blocks:
    """Random ones, without double quantization."""
    packed = torch.randint(0, 256, (out * columns // 2, 1), dtype=torch.uint8)
    table = torch.tensor(bnb_nf4.NF4)
    return Nf4Blocks(packed, torch.rand(out * columns // 64), table, (out, columns), 64, torch.bfloat16)


def blocks(kind: str) -> Callable[[int, int], GgmlBlocks]:
    """Random ones of a ggml type."""
    elements, size = BLOCKS[kind]
    return lambda out, columns: GgmlBlocks(
        torch.randint(0, 100, (out, columns // elements * size), dtype=torch.uint8), kind, (out, columns)
    )


CONTAINERS: dict[str, tuple[Container, dict[str, object], Callable[[int, int], Codes]]] = {
    "AutoAWQ": (autoawq, autoawq.quantization_config(GROUP, []), uniform),
    "GPTQ": (autogptq, autogptq.quantization_config(4, GROUP, False, 0.1), uniform),
    "compressed-tensors": (compressed_tensors, compressed_tensors.quantization_config(4, GROUP, False, False), uniform),
    "NF4": (bnb_nf4, bnb_nf4.quantization_config(False, []), nf4),
}


@contextmanager
def told(what: str) -> Iterator[None]:
    """Print what the block took."""
    clock, processor = time.perf_counter(), time.process_time()
    yield
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    print(f"{what:32s} processor {processor:6.2f} s   clock {clock:6.2f} s", flush=True)


def bench(name: str, container: Container, section: dict[str, object], made: list[Codes]) -> None:
    """One container."""
    with tempfile.TemporaryDirectory() as folder, workers("packing", 8) as pool:
        specs = {
            f"m{i}.{suffix}": spec
            for i, shape in enumerate(SHAPES)
            for suffix, spec in container.specs(*shape, section, torch.float16).items()
        }
        writer = open_shards(Path(folder), specs, "bench")
        linears = Linears(Checkpoint.open(Path(folder)), section)

        def put(i: int) -> None:
            for suffix, tensor in container.pack(made[i], section).items():
                writer.write(f"m{i}.{suffix}", tensor)
            if not linears.codes(f"m{i}").equals(made[i]):
                raise SystemExit(f"{name}: m{i} differs")

        with told(f"{name}: pack, write, compare"):
            list(pool.map(put, range(len(made))))
        with told(f"{name}: verify"):
            list(pool.map(lambda i: see_codes(linears.codes(f"m{i}")), range(len(made))))
        writer.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    for name, (container, section, make) in CONTAINERS.items():
        bench(name, container, section, [make(*shape) for shape in SHAPES])
    for kind in ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q5_0"):
        codes = [blocks(kind)(*shape) for shape in SHAPES]
        with told(f"{kind}: verify"), workers("verifying") as pool:
            list(pool.map(see_codes, codes))


if __name__ == "__main__":
    main()
