#!/usr/bin/env python3
"""Mixtures of experts under the real vLLM on a processor: what its loader makes of every expert of every container.

Two small random models (Qwen3MoE, Mixtral) are made here, and rounded to nearest into AWQ, GPTQ and compressed-tensors.
vLLM runs in an environment of its own (--python; docs/vllm.md says how to make one):

1. The unquantized models answer; the log-probabilities are held against qtool's reference: router, normalisation and
   names of experts are the same model's.
2. Every artifact is loaded. vLLM 0.32 has a kernel for four-bit experts on processors with AMX tiles alone, and refuses
   elsewhere, which is reported. Its loader is asked all the same, and every tensor of every expert, as it lies in
   vLLM's layers, is compared bit for bit with what the artifact holds. Experts exchanged must be told.

Exit codes: 0 all agrees, 1 something does not, 3 no vLLM.

Example:
  python scripts/check_vllm_experts.py --python vllm-cpu/bin/python
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))  # the models and the plain rounding are the tests' own

from check_vllm import BFLOAT16_LIMIT, TOP1, compare, reference_of  # noqa: E402
from moe_models import MIXTURES  # noqa: E402
from plain_rounding import rounded  # noqa: E402
from small_models import make_model  # noqa: E402

from qtool.convert.artifact import Artifact  # noqa: E402
from qtool.convert.models.shape import decoder_of  # noqa: E402

OUTPUTS: list[dict[str, Any]] = [
    {"method": "awq", "name": "awq", "group_size": 32, "dtype": "bfloat16"},
    {"method": "gptq", "name": "gptq", "group_size": 32, "dtype": "bfloat16"},
    {"method": "gptq", "name": "ct-sym", "group_size": 32, "format": "compressed-tensors", "dtype": "bfloat16"},
    {"method": "gptq", "name": "ct-asym", "group_size": 32, "format": "compressed-tensors", "sym": False,
     "dtype": "bfloat16"},
]  # fmt: skip
PARTS = {"w13": ("gate", "up"), "w2": ("down",)}


def make(architecture: str, folder: Path) -> dict[str, Path]:
    """Name -> the model, and its artifacts."""
    changes = MIXTURES[architecture] | {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 2}
    changes |= {"mlp_only_layers": []} if "mlp_only_layers" in changes else {}
    changes["moe_intermediate_size" if "moe_intermediate_size" in changes else "intermediate_size"] = 128
    folder.mkdir()
    model = make_model(folder / "model", architecture, loudness=0.4, **changes)
    made: dict[str, Path] = {"source": model} | rounded(model, OUTPUTS, folder)
    return made


def expected(artifact: Artifact, layer: int, parameter: str, swap: bool = False) -> Tensor:
    """What vLLM's ``parameter`` of a layer's experts must hold: the file's tensors, gate's rows before up's. ``swap``:
    the first two experts in each other's place."""
    decoder = decoder_of(artifact.config)
    assert decoder.family.mixture is not None
    part, suffix = parameter.split("_", 1)
    rows = 0 if suffix.startswith("weight_") else 1  # AWQ's and GPTQ's tensors have columns first
    order = list(range(decoder.shape.experts))
    order[:2] = reversed(order[:2]) if swap else order[:2]
    stacked = []
    for expert in order:
        modules = [decoder.at(layer) + decoder.family.mixture.module(expert, one) for one in PARTS[part]]
        stacked.append(torch.cat([artifact.checkpoint.tensor(f"{module}.{suffix}") for module in modules], rows))
    return torch.stack(stacked)


def digest(tensor: Tensor) -> str:
    """As interop_vllm_experts.py hashes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def loaded(python: str, name: str, path: Path, work: Path) -> tuple[str, list[str]]:
    """(a line to print, what does not agree) of one artifact."""
    out = work / "loaded.json"
    out.unlink(missing_ok=True)
    with (work / "vllm.log").open("a", encoding="utf-8") as log:
        command = [python, str(HERE / "interop_vllm_experts.py"), str(path), str(out)]
        subprocess.run(command, stdout=log, stderr=log, check=False)
    if not out.exists():
        return f"{name}: vLLM died", [f"{name}: {work / 'vllm.log'} says why"]
    found, artifact = json.loads(out.read_text(encoding="utf-8")), Artifact.open(path)
    faults = [f"{name}: {found['failed']}"] if found["failed"] else []
    layers = decoder_of(artifact.config).shape.layers
    compared = 0
    for layer in range(layers):
        (held,) = (held for key, held in found["layers"].items() if f".{layer}." in key)
        for parameter, (_, shape, hashed) in held.items():
            if parameter.endswith(("_bias", "_shape", "_g_idx")):  # made by vLLM, or not kept
                continue
            wanted = expected(artifact, layer, parameter)
            same = list(wanted.shape) == shape and digest(wanted) == hashed
            told = digest(expected(artifact, layer, parameter, swap=True)) != hashed
            faults += [] if same else [f"{name}: layer {layer}: {parameter} is not the file's"]
            faults += [] if told or parameter.endswith("qzeros") else [f"{name}: {parameter}: exchange not told"]
            compared += 1
    faults += [] if compared >= 4 * layers else [f"{name}: only {compared} tensors were compared"]
    return f"{name}: {compared} stacks bit for bit; as it stands: {found['refused'] or 'loads'}", faults


def answers(python: str, paths: dict[str, Path], work: Path) -> list[str]:
    """What the unquantized models answer; returns what does not agree."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 320, (20,), generator=generator).tolist() for _ in range(8)]
    models = [{"label": name, "path": str(path), "dtype": "bfloat16"} for name, path in paths.items()]
    job = {"models": models, "prompts": prompts, "tokens": 16, "best": 5, "context": 64, "options": {}}
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    out = work / "answers.jsonl"
    with (work / "vllm.log").open("a", encoding="utf-8") as log:
        command = [python, str(HERE / "interop_vllm.py"), str(work / "job.json"), str(out)]
        if subprocess.run(command, stdout=log, stderr=log, check=False).returncode != 0:
            print(f"{python}: vLLM cannot be started; {work / 'vllm.log'} says why.", file=sys.stderr)
            raise SystemExit(3)
    faults = []
    for line in out.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "error" in row:
            faults.append(f"{row['label']}: {row['error']}")
            continue
        distance, top1 = compare(reference_of(paths[row["label"]]), prompts, row["answers"])
        print(f"{row['label']}: mean |difference| {distance:.4f} nats, same token {top1:.1%}", flush=True)
        if distance > BFLOAT16_LIMIT or top1 < TOP1:
            faults.append(f"{row['label']}: differs from the reference")
    return faults


def main() -> None:
    """Parse the command line and exit with the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3", help="of an environment with vLLM (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = {name: make(name, work / name) for name in ("Qwen3Moe", "Mixtral")}
        faults = answers(args.python, {name: paths["source"] for name, paths in made.items()}, work)
        for name, paths in made.items():
            for output, path in paths.items():
                if output != "source":
                    line, wrong = loaded(args.python, f"{name} {output}", path, work)
                    print(line, flush=True)
                    faults += wrong
    for fault in faults:
        print(fault, file=sys.stderr)
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
