"""What a change of structure must not change: sha256 of everything that qtool makes from fixed models, one line each.

    python scripts/fingerprints.py > before.txt      # at the old commit
    python scripts/fingerprints.py > after.txt       # at the new one
    diff before.txt after.txt                        # each line of it is an intended change, or a fault

The models: the demo, and a random one of two layers for each family; the outputs: every method and container. Only
the command line is used, so that modules may move. Compare on one machine, with the same packages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = (
    "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Ministral3", "SeedOss", "Granite", "Starcoder2",
)  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {  # of the models that llama.cpp takes with some values alone
    "Gemma2": {"query_pre_attn_scalar": 32},
    "Gemma3": {"query_pre_attn_scalar": 32, "layer_types": ["sliding_attention", "full_attention"]},
}
OUTPUTS = """
  - {method: awq, group_size: 32, dtype: bfloat16}
  - {method: awq, name: rtn, group_size: 64, scaling: none, rounding: rtn, dtype: bfloat16}
  - {method: gptq, group_size: 32, dtype: bfloat16}
  - {method: gptq, name: order, group_size: 32, desc_act: true, dtype: bfloat16}
  - {method: gptq, name: rows8, group_size: -1, bits: 8, dtype: bfloat16}
  - {method: gptq, name: v2, group_size: 32, sym: false, dtype: bfloat16}
  - {method: gptq, name: ct, group_size: 32, format: compressed-tensors, scaling: awq, dtype: bfloat16}
  - {method: gptq, name: ct-asym, group_size: 32, format: compressed-tensors, sym: false, dtype: bfloat16}
  - {method: nf4}
  - {method: nf4, name: nf4-single, double_quant: false}
  - {method: gguf}
  - {method: gguf, name: Q5_K_S, type: Q5_K_S, imatrix: false}
  - {method: gguf, name: BF16, type: BF16}
"""
RECIPE = """\
model: {model}
calibration: {{text: {text}, samples: 8, length: 64}}
outputs:{outputs}
evaluate:
  text: {{text: {text}, samples: 4, length: 64, seed: 3}}
gates:
  - max_kld: 5.0
"""
CONFIGS: dict[str, dict[str, Any]] = {  # plans from headers alone
    "llama-8b": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
                 "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072},
    "iquest-40b": {"architectures": ["IQuestCoderForCausalLM"], "model_type": "iquestcoder", "hidden_size": 5120,
                   "num_hidden_layers": 80, "num_attention_heads": 40, "num_key_value_heads": 8,
                   "intermediate_size": 27648, "vocab_size": 76800, "max_position_embeddings": 131072},
    "qwen2-7b": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
                 "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                 "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 32768},
    "qwen3-8b": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "head_dim": 128,
                 "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "intermediate_size": 12288, "vocab_size": 151936, "max_position_embeddings": 40960},
    "mistral-7b": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
                   "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "intermediate_size": 14336, "vocab_size": 32768, "max_position_embeddings": 32768},
    "gemma3-4b": {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 2560,
                  "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                  "intermediate_size": 10240, "vocab_size": 262208, "max_position_embeddings": 131072,
                  "sliding_window": 1024, "tie_word_embeddings": True},
}  # fmt: skip
# Times, durations and this folder's name: what may differ between two runs of one version.
VOLATILE = [
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\+00:00|Z| UTC)?"), "TIME"),
    (re.compile(r'("seconds": |>seconds</\w+><\w+>)[\d.]+'), r"\1N"),
    (re.compile(r"\b\d+(\.\d+)? (s|seconds|minutes)\b"), "DURATION"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only lines whose name begins so: demo, plan, Llama, …")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory(prefix="qtool-fingerprints-") as name:
        # a fixed name: the run's id and the card hold the path of the model
        folder = Path(name)
        for label, data in everything(folder, only):
            print(f"{hashlib.sha256(data).hexdigest()[:24]}  {label}", flush=True)


def everything(folder: Path, only: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of all that is made."""
    if "plan".startswith(only):
        yield from plans(folder)
    if "demo".startswith(only):
        yield from run(folder / "demo", ROOT / "recipes/smoke.yaml", "demo")
    sys.path.insert(0, str(ROOT / "tests"))
    from small_models import TEXT, make_model

    for family in FAMILIES:
        if not family.startswith(only):
            continue
        work = folder / family
        work.mkdir()
        (work / "text.txt").write_text(TEXT)
        make_model(work / "model", family, **CHANGES.get(family, {}))
        (work / "recipe.yaml").write_text(RECIPE.format(model="model", text="text.txt", outputs=OUTPUTS.rstrip()))
        yield from run(work, work / "recipe.yaml", family)


def plans(folder: Path) -> Iterator[tuple[str, bytes]]:
    for name, config in CONFIGS.items():
        model = folder / name
        model.mkdir()
        full = {"rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "tie_word_embeddings": False} | config
        (model / "config.json").write_text(json.dumps(full))
        yield f"plan/{name}.json", normal(qtool(folder, "plan", name, "--json"), folder)


def run(work: Path, recipe: Path, label: str) -> Iterator[tuple[str, bytes]]:
    work.mkdir(exist_ok=True)
    qtool(work, "run", str(recipe), "--device", "cpu", allowed=(0, 1))
    for path in sorted((work / "artifacts").rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            yield f"{label}/{path.relative_to(work)}", normal(data.decode(), work) if path.suffix == ".json" else data
    qtool(work, "report", "latest")
    check = work / "check.json"
    qtool(work, "check", "latest", "--json", str(check), allowed=(0, 1))
    yield f"{label}/check.json", normal(check.read_text(), work)
    for pattern in ("report.html", "report.md", "result.json"):
        for path in sorted((work / "runs").glob(f"*/{pattern}")):
            yield f"{label}/{pattern}", normal(path.read_text(), work)


def qtool(work: Path, *arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
    environment = os.environ | {"COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-m", "qtool", *arguments]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode not in allowed:
        sys.exit(f"{' '.join(arguments)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def normal(text: str, work: Path) -> bytes:
    text = text.replace(str(work), "WORK").replace(str(ROOT), "ROOT")
    for pattern, word in VOLATILE:
        text = pattern.sub(word, text)
    return text.encode()


if __name__ == "__main__":
    main()
