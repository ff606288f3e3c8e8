"""A whole `qtool run` of a random model, stage by stage: what everything beside the rounding takes.

    python scripts/bench_run.py FOLDER --layers 4                          # 8B geometry, rounding to the nearest
    python scripts/bench_run.py FOLDER --layers 4 --python OTHER/.venv/bin/python   # another tree on the same model

bf16 weights, a small vocabulary, text that matters little. Seconds of the clock and of the processors, bytes read and
written, the peaks of memory, and a digest over all files of the artifacts: it is the same for two trees that write the
same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qtool.convert.files.source import shipped

GROUPS = Path("/sys/fs/cgroup")
GEOMETRIES = {
    "8b": (4096, 14336, 32),
    "40b": (5120, 27648, 40),
    "small": (1024, 3072, 16),
    "tiny": (512, 1536, 8),
    "least": (256, 768, 8),
    "mid": (2048, 6144, 16),
}
OUTPUTS: list[dict[str, Any]] = [
    {"method": "awq", "rounding": "rtn", "scaling": "none", "clip": False},
    {"method": "nf4", "rounding": "absmax"},
    {"method": "gguf", "type": "Q4_K_M", "rounding": "ggml"},
    {"method": "gguf", "name": "q8", "type": "Q8_0"},
]


def make_model(folder: Path, geometry: str, layers: int, device: str = "cpu") -> Path:
    """The demo model's tokenizer and vocabulary, a shard a layer; its weights are drawn on ``device``."""
    demo = shipped("qtool-demo")
    shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.svg", "README*"))
    hidden, intermediate, heads = GEOMETRIES[geometry]
    config = json.loads((demo / "config.json").read_text())
    config |= {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads, "head_dim": 128,
        "num_key_value_heads": 8, "num_hidden_layers": layers, "max_position_embeddings": 32768,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(0.02).to(torch.bfloat16).cpu()

    one = torch.ones(hidden, dtype=torch.bfloat16)
    shards = [{"model.embed_tokens.weight": random(config["vocab_size"], hidden), "model.norm.weight": one}]
    rows = {"q": heads * 128, "k": 1024, "v": 1024}
    for layer in range(layers):
        tensors = {f"self_attn.{name}_proj": random(count, hidden) for name, count in rows.items()}
        tensors["self_attn.o_proj"] = random(hidden, heads * 128)
        tensors |= {f"mlp.{name}_proj": random(intermediate, hidden) for name in ("gate", "up")}
        tensors["mlp.down_proj"] = random(hidden, intermediate)
        tensors |= {"input_layernorm": one, "post_attention_layernorm": one.clone()}
        shards.append({f"model.layers.{layer}.{name}.weight": tensor for name, tensor in tensors.items()})
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def digest(folder: Path) -> str:
    """Of every file but the manifests, which tell times and versions."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "qtool.json"):
        with path.open("rb") as file:
            found.update(path.relative_to(folder).as_posix().encode())
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


@contextmanager
def limited(gib: float | None) -> Iterator[Callable[[], None] | None]:
    """A control group with so much memory, removed at the end; what a child calls to join it."""
    if gib is None:
        yield None
        return
    group = GROUPS / ("memory" if (GROUPS / "memory").is_dir() else "") / f"qtool-bench-{os.getpid()}"
    group.mkdir()
    first = (group / "memory.limit_in_bytes").exists()  # version 1 of the kernel's interface
    (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(int(gib * 2**30)))
    try:

        def join() -> None:
            (group / "cgroup.procs").write_text("0")

        yield join
        peak = (group / ("memory.max_usage_in_bytes" if first else "memory.peak")).read_text()
        print(f"the group's peak {int(peak) / 1e9:.2f} GB of {gib * 2**30 / 1e9:.2f}, files read included")
    finally:
        group.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the model is made in it once; the artifacts are removed again")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--outputs", default="awq,nf4,gguf")
    parser.add_argument("--python", default=sys.executable, help="of the tree that runs")
    parser.add_argument("--limit", type=float, help="GiB of a control group of its own (as root), files read included")
    options = parser.parse_args()
    model = options.folder / f"{options.geometry}-{options.layers}"
    if not model.exists():
        make_model(model, options.geometry, options.layers)
    work = options.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    recipe = {
        "model": str(model.resolve()), "calibration": {"text": "qtool-code", "samples": 4, "length": 128},
        "outputs": [output for output in OUTPUTS if output["method"] in options.outputs.split(",")],
        "output_dir": "artifacts",
    }  # fmt: skip
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    print(f"weights {sum(path.stat().st_size for path in model.glob('*.safetensors')) / 1e9:.2f} GB", flush=True)
    command = [options.python, "-P", "-m", "qtool", "plan", "recipe.yaml", "--json"]
    planned = subprocess.run(command, cwd=work, check=True, capture_output=True, text=True).stdout
    print(f"planned host memory {json.loads(planned)['host_bytes'] / 1e9:.2f} GB", flush=True)
    began, before = time.monotonic(), os.times()
    command = [options.python, "-P", "-m", "qtool", "run", "recipe.yaml", "--device", "cpu"]
    with limited(options.limit) as join:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=work, check=False, env=environment, preexec_fn=join)
    seconds, after = time.monotonic() - began, os.times()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"ended with {done.returncode}")
    (result,) = work.glob("runs/*/result.json")
    told = json.loads(result.read_text())
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{seconds:.1f} s, of the processors {processor:.1f} s; stages: {told['stages']}; peaks: {told['peaks']}")
    print(f"peak resident {used.ru_maxrss / 2**20:.2f} GiB; blocks read {used.ru_inblock}, written {used.ru_oublock}")
    print(f"bytes of the artifacts: {digest(work / 'artifacts')}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
