#!/usr/bin/env python3
"""Families of models against vLLM's own code: what it computes of a source, of its outputs, and of folded scales.

Small random models (MODELS of tests/test_dense_families.py) and their outputs are made here; vLLM's CPU build, in an
environment of its own, answers how likely every token of two prompts is (`interop_vllm_logprobs.py`). Compared with
qtool's reference engine, of each family:

- the source, and the source with AWQ's scales in its matrices and no rounding, in float32: the largest difference of a
  log-probability from what the reference computes of the source, against the largest logit;
- AWQ, GPTQ and compressed-tensors in float16 (bfloat16 where vLLM runs the family in no other): mean KL, of Loop every
  gate's numbers against the file's;
- NF4 of Loop: refused by vLLM, in the words that `qtool verify` has for it.

With `--gguf` no vLLM is asked: of each family that llama.cpp has, F16 is written and run there, and the mean KL to the
reference is told with keys and values in float32 and attention step by step; as a server runs it; and, of the first, to
the reference with every matrix's input rounded to float16, as ggml rounds it.

Exit codes: 0 all agrees, 1 something does not, 3 no vLLM.

Examples:
  python scripts/check_families.py --python vllm-cpu/bin/python
  python scripts/check_families.py --python vllm-cpu/bin/python --only Loop
  python scripts/check_families.py --gguf
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.models.model_config import runtime_keys
from qtool.convert.models.table import family_of
from qtool.convert.skeleton import load_config
from qtool.convert.verify.checks import verify
from qtool.evaluate.engines.torch_model import load_model

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
EXACT, PARITY = 1e-5, {"float16": 1e-3, "bfloat16": 1e-2}  # the last is what vLLM's own arithmetic costs there
NOT_IN_LLAMA_CPP = ("SeedOss-biases", "Starcoder2")  # with these settings: biases of o; a window
LENGTHS = (48, 100)  # longer than the windows
OUTPUTS: list[dict[str, Any]] = [
    {"method": "awq", "group_size": 32}, {"method": "gptq", "group_size": 32},
    {"method": "gptq", "name": "ct", "format": "compressed-tensors", "group_size": 32},
]  # fmt: skip


def make(name: str, folder: Path) -> list[dict[str, str]]:
    """The models that vLLM is asked: the source, the folded source, the outputs."""
    from small_models import converted, make_model
    from test_dense_families import MODELS

    architecture, changes = MODELS[name]
    model = make_model(folder / "model", architecture, **changes | {"tie_word_embeddings": False})
    config = model / "config.json"
    said = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(said | runtime_keys(said)), encoding="utf-8")  # as the outputs' have it
    outputs = [*OUTPUTS, {"method": "nf4"}] if name == "Loop" else OUTPUTS
    dtype = "float16" if family_of(said).float16 else "bfloat16"
    dtypes = [output | ({} if output["method"] == "nf4" else {"dtype": dtype}) for output in outputs]
    made = converted(model, dtypes, folder)
    asked = [{"label": "source", "path": str(model), "dtype": "float32"}]
    asked += [{"label": name, "path": str(path), "dtype": dtype} for name, path in made.items()]
    return [*asked, {"label": "folded", "path": str(folded(model, folder / "folded")), "dtype": "float32"}]


def folded(model: Path, folder: Path) -> Path:
    """The source with AWQ's scales in its matrices and norms, in float32."""
    from test_dense_families import folded_source

    folder.mkdir()
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: t.contiguous() for name, t in folded_source(model).items()}, folder / "model.safetensors")
    return folder


def compare(asked: dict[str, str], said: dict[str, Any], prompts: list[list[int]], source: Path) -> tuple[str, bool]:
    """(what was found, whether it is as it should be)."""
    label, path = asked["label"], Path(asked["path"])
    plain = label in ("source", "folded")
    if "error" in said:
        rules = [] if plain else [check for check in verify(path, None).checks if "vLLM" in check.name]
        told = [check.detail for check in rules if check.status == "fail"]
        return f"refused: {said['error'][:110]}; qtool: {told}", label == "nf4" and bool(told)
    truth = source if plain else path
    state = dict(Checkpoint.open(truth).read() if plain else Artifact.open(path).read())
    reference = load_model(iter(state.items()), load_config(truth), torch.device("cpu"))
    gap, kl, top = 0.0, [], 0.0
    for ids, found in zip(prompts, said["logprobs"], strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([ids])).logits[0, :-1].float()
        expected = logits.log_softmax(-1)
        gap, top = max(gap, float((expected - found).abs().max())), max(top, float(logits.abs().max()))
        kl.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
    if plain:
        return f"largest difference {gap:.1e}, of logits up to {top:.1f}", gap / top < EXACT
    # vLLM's kernel for the CPU takes float32 weights into a form of its own: gates are compared in 16 bits
    same = all(torch.equal(value, state[name].float()) for name, value in said["gates"].items())
    count = sum("gate_projections" in name for name in state)
    right = same and len(said["gates"]) == count
    gates = f", {count} tensors of gates {'equal' if right else 'DIFFER'}" if count else ""
    return f"KL {max(kl):.1e}{gates}", max(kl) < PARITY[asked["dtype"]] and right


def check(name: str, python: Path, prompts: list[list[int]]) -> bool:
    """One family, a line for each model."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        models = make(name, folder)
        job, out = folder / "job.json", folder / "out.pt"
        job.write_text(json.dumps({"models": models, "prompts": prompts}), encoding="utf-8")
        run = [str(python), str(HERE / "interop_vllm_logprobs.py"), str(job), str(out)]
        with (folder / "vllm.log").open("w") as log:
            subprocess.run(run, check=True, stdout=log, stderr=log)
        said, fine = torch.load(out), True
        for asked in models:
            text, right = compare(asked, said[asked["label"]], prompts, folder / "model")
            fine &= right
            print(f"{name:14} {asked['label']:6} {asked['dtype']}: {text}{'' if right else '   <- WRONG'}", flush=True)
    return fine


def check_gguf(name: str) -> bool:
    """One family's F16 in llama.cpp, a line; True where it has none there."""
    from llama_logits import divergence, llama_logprobs, reference_logprobs
    from small_models import converted, make_model
    from test_dense_families import MODELS

    architecture, changes = MODELS[name]
    if family_of({"architectures": [f"{architecture}ForCausalLM"]}).gguf is None or name in NOT_IN_LLAMA_CPP:
        return True
    with tempfile.TemporaryDirectory() as place:
        model = make_model(Path(place) / "model", architecture, **changes)
        made = converted(model, [{"method": "gguf", "name": "f16", "type": "F16"}], Path(place))["f16"]
        artifact = Artifact.open(made)
        ids = torch.randint(3, 320, (48,), generator=torch.Generator().manual_seed(1)).tolist()
        positions = list(range(47, 2, -5))
        exact, usual = (llama_logprobs(artifact, ids, positions, each) for each in (True, False))
        plain, rounded = (reference_logprobs(artifact, model, ids, each)[positions] for each in (False, True))
        kl = divergence(plain, exact)
        print(f"{name:14} F16: KL {kl:.1e}, as served {divergence(plain, usual):.1e}; "
              f"to rounded inputs {abs(divergence(rounded, exact)):.1e}", flush=True)  # fmt: skip
        return bool(kl < EXACT)


def main() -> int:
    from test_dense_families import MODELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--python", type=Path, help="of vLLM's environment")
    asked.add_argument("--gguf", action="store_true", help="llama.cpp's F16 instead")
    parser.add_argument("--only", default=",".join(MODELS), help="families, comma-separated")
    options = parser.parse_args()
    if options.gguf:
        return 0 if all([check_gguf(name) for name in options.only.split(",")]) else 1  # noqa: C419  # every one is asked
    if not options.python.exists():
        print(f"{options.python}: no such file", file=sys.stderr)
        return 3
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 320, (length,), generator=generator).tolist() for length in LENGTHS]
    return 0 if all([check(name, options.python, prompts) for name in options.only.split(",")]) else 1  # noqa: C419  # every one is asked


if __name__ == "__main__":
    sys.exit(main())
