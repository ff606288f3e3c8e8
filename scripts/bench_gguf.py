"""qtool's one pass to Q4_K_M beside llama.cpp's three programs, on the same model and calibration text.

    python scripts/bench_text.py BENCH MODEL
    python scripts/bench_gguf.py BENCH MODEL LLAMA_CPP --out DIR

LLAMA_CPP: llama.cpp's source folder with its programs built in build/bin. Prints one JSON line for each side: seconds,
disk (bytes in DIR at the end, intermediate files included), bits per weight; then the mean KL to the source of both.
Where llama.cpp's converter refuses the model (an unknown pre-tokenizer), its two other programs start from qtool's own
BF16 file and its seconds lack the conversion.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.reading import read_json
from qtool.convert.files.source import resolve
from qtool.convert.formats.gguf.file import GgufFile
from qtool.convert.skeleton import load_config
from qtool.convert.text.source import TextSource
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.text.windows import token_windows
from qtool.evaluate import fidelity
from qtool.evaluate.engines.torch_model import load_model, logits_of
from qtool.evaluate.statistics import bootstrap_mean
from qtool.make.job import open_job
from qtool.make.outputs import make_artifacts
from qtool.quantize.calibration import CalibrationSet
from qtool.recipe.sections import Recipe


def main() -> None:
    """Both sides, one after the other, then the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("model")
    parser.add_argument("llama", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    ours = qtool(options, "Q4_K_M")
    bits(ours["file"], ours, Path(ours["file"]).parent)
    theirs = llama_cpp(options)
    bits(theirs["file"], theirs, options.out / "llama.cpp")
    compare(options, ours["file"], theirs["file"])


def qtool(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """The recipe a user would write."""
    recipe = Recipe.model_validate(
        {
            "model": options.model,
            "calibration": {
                "text": str(options.bench / "calibration.jsonl"), "samples": options.samples, "length": options.length,
            },
            "outputs": [{"method": "gguf", "name": kind, "type": kind}],
            "output_dir": str(options.out),
        }
    )  # fmt: skip
    started = time.perf_counter()
    job = open_job(recipe, resolve(recipe.model.id), torch.device("cpu"), recipe.outputs)
    tokens = token_windows(recipe.calibration, load_tokenizer(job.source.path, False))
    artifact = make_artifacts(job, CalibrationSet(tokens, "bench"))[kind]
    return {"side": f"qtool {kind}", "seconds": round(time.perf_counter() - started, 1), "file": str(artifact.gguf)}


def llama_cpp(options: argparse.Namespace) -> dict[str, Any]:
    """convert_hf_to_gguf.py, llama-imatrix, llama-quantize."""
    folder = options.out / "llama.cpp"
    folder.mkdir(exist_ok=True)
    full, matrix, small = folder / "bf16.gguf", folder / "imatrix.gguf", folder / "Q4_K_M.gguf"
    source = resolve(options.model).path
    text = folder / "calibration.txt"
    documents = (options.bench / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    text.write_text("\n".join(json.loads(line)["text"] for line in documents), encoding="utf-8")
    seconds = {}
    converter = [sys.executable, str(options.llama / "convert_hf_to_gguf.py"), str(source), "--outtype", "bf16"]
    started = time.perf_counter()
    converted = subprocess.run([*converter, "--outfile", str(full)], capture_output=True, check=False)
    seconds["convert"] = time.perf_counter() - started
    if converted.returncode:
        print(f"llama.cpp's converter: {converted.stderr.decode().strip().splitlines()[-1]}", file=sys.stderr)
        full = Path(qtool(options, "BF16")["file"])
        seconds["convert"] = 0.0
    programs = {
        "imatrix": ["llama-imatrix", "-m", full, "-f", text, "-o", matrix, "-c", options.length,
                    "--chunks", options.samples],
        "quantize": ["llama-quantize", "--imatrix", matrix, full, small, "Q4_K_M"],
    }  # fmt: skip
    for name, (program, *arguments) in programs.items():
        started = time.perf_counter()
        command = [str(options.llama / "build/bin" / program), *map(str, arguments)]
        subprocess.run(command, capture_output=True, check=True)
        seconds[name] = time.perf_counter() - started
    parts = {name: round(value, 1) for name, value in seconds.items()}
    return {"side": "llama.cpp", "seconds": round(sum(seconds.values()), 1), "parts": parts, "file": str(small)}


def bits(file: str, row: dict[str, Any], folder: Path) -> None:
    """Print a side's line."""
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".txt")
    print(json.dumps(row | {"bytes": Path(file).stat().st_size, "disk": disk}))


def compare(options: argparse.Namespace, ours: str, theirs: str) -> None:
    """Mean KL to the source on held-out text, both dequantized by the same engine; and the tensors that differ."""
    source = resolve(options.model).path
    config, tokenizer = load_config(source), load_tokenizer(source, False)
    raw = read_json(source / "config.json")
    text = TextSource(text=str(options.bench / "heldout.jsonl"), samples=12, length=options.length)
    windows = token_windows(text, tokenizer)
    device = torch.device("cpu")
    folder = tempfile.TemporaryDirectory(prefix="qtool-")
    model = load_model(Checkpoint.open(source).read(), config, device)
    reference = fidelity.make_reference(logits_of(model), windows, Path(folder.name) / "source")
    for name, file in (("qtool", ours), ("llama.cpp", theirs)):
        model = load_model(GgufFile.open(Path(file), raw).read(), config, device)
        kl = fidelity.diverge(logits_of(model), windows, reference, lambda: None).kl
        interval = bootstrap_mean(kl)
        print(json.dumps({"side": name, "KL": [round(interval.estimate, 5), interval.low, interval.high]}))
    one, two = (GgufFile.open(Path(file), raw).layout for file in (ours, theirs))
    different = [name for name in two if one.get(name) != two[name]]
    print(json.dumps({"tensors": len(two), "of another type or shape": different}))


if __name__ == "__main__":
    main()
