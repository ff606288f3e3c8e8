"""Whether several cards make the bytes of one: a small recipe with 1, 2, 4 … ranks, one of them killed in the middle.

    python scripts/check_cards.py                     # as many cards as there are: 1, 2, 4, 8
    python scripts/check_cards.py --device cpu        # ranks on the processor, over gloo: 1, 2, 4
    python scripts/check_cards.py --numbers 1 2 --keep

Random models of four layers, dense and a mixture of experts; AWQ and GPTQ with and without a stream of their own, NF4
where bitsandbytes is installed, Q4_K_M by descent and by importance. Every file of every artifact is compared by sha256
with those of one rank, the manifests too. Then a rank is killed (SIGKILL) once a layer is noted, and the same recipe
goes on with another number. Prints a table; 1 where anything differed. No network is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
SAMPLES, LENGTH = {"cpu": 40, "cuda": 160}, 512  # five batches
SPARSE = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32, "num_hidden_layers": 4,
    "max_position_embeddings": 1024,
}  # fmt: skip
# The command as ranks on a processor, which `--gpus` refuses
ON_CPU = (
    "import os, sys; from qtool.cli.cards import launch; sys.exit(launch(sys.argv[2:], int(sys.argv[1]), os.environ))"
)


@dataclass
class Row:
    """One run: of which model, by how many ranks, how it ended, and whether its files are those of one rank."""

    model: str
    ranks: str
    seconds: float
    files: int
    said: str
    good: bool


class Recipe:
    """A model's recipe in a folder of its own."""

    def __init__(self, work: Path, model: str, device: str) -> None:
        self.folder, self.device, self.model = work / model, device, model
        grid = {"group_size": 32, "dtype": "bfloat16"}
        outputs: list[dict[str, object]] = [
            {"method": "awq", **grid}, {"method": "gptq", **grid},
            {"method": "awq", "name": "awq-source", "propagate_error": False, "rounding": "rtn", **grid},
        ]  # fmt: skip
        if find_spec("gguf") and (device == "cuda" or find_spec("xllamacpp")):
            outputs += [{"method": "gguf"}, {"method": "gguf", "name": "ggml", "rounding": "ggml"}]
        if find_spec("bitsandbytes") and model == "dense":
            outputs += [{"method": "nf4"}]
        self.outputs = outputs
        self.text = {"text": str(work / "text.txt"), "samples": SAMPLES[device], "length": LENGTH}

    def command(self, number: int, case: str) -> list[str]:
        """`qtool run` of a fresh or begun folder ``case``."""
        place = self.folder / case
        place.mkdir(parents=True, exist_ok=True)
        asked = {
            "model": str(self.folder / "model"), "calibration": self.text, "outputs": self.outputs,
            "output_dir": str(place / "artifacts"),
        }  # fmt: skip
        (place / "r.yaml").write_text(json.dumps(asked))
        words = ["run", str(place / "r.yaml"), "--runs", str(place / "runs"), "--device", self.device]
        if number == 1:
            return [sys.executable, "-m", "qtool", *words]
        if self.device == "cuda":
            return [sys.executable, "-m", "qtool", *words, "--gpus", str(number)]
        return [sys.executable, "-c", ON_CPU, str(number), *words]

    def run(self, number: int, case: str) -> Row:
        """Run it to its end."""
        begun = time.monotonic()
        done = subprocess.run(self.command(number, case), capture_output=True, text=True, check=False)
        seconds = time.monotonic() - begun
        found = sums(self.folder / case)
        if done.returncode:
            said = f"exit code {done.returncode}: {done.stderr.strip()[-600:]}"
            return Row(self.model, str(number), seconds, len(found), said, False)
        alone = sums(self.folder / "1")
        differing = sorted(name for name in found.keys() | alone.keys() if found.get(name) != alone.get(name))
        said = f"differ: {', '.join(differing[:4])}" if differing else "equal"
        return Row(self.model, str(number), seconds, len(found), said, not differing)

    def kill(self, number: int, case: str) -> Row:
        """Kill the last rank once every output has noted a layer."""
        begun = time.monotonic()
        running = subprocess.Popen(
            self.command(number, case), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        calibrated = 2 * len(self.outputs)  # journals, at most
        while running.poll() is None:
            layers = [path.read_text().count("\n") - 1 for path in self.folder.glob(f"{case}/**/*journal.jsonl")]
            if len(layers) >= len(self.outputs) and min(layers) > 0 and len(layers) <= calibrated:
                break
            time.sleep(0.005)
        ranks = ranks_of(running.pid)
        if running.poll() is None and str(number - 1) in ranks:
            os.kill(ranks[str(number - 1)], signal.SIGKILL)
        killed = time.monotonic()
        _, words = running.communicate()
        line = next((line for line in words.splitlines() if line.startswith("Error:")), "ended before it was killed")
        left = ranks_of(running.pid)
        said = f"exit code {running.returncode} after {time.monotonic() - killed:.1f} s: {line}"
        good = running.returncode == 3 and f"rank {number - 1} of {number}: was ended by SIGKILL" in line and not left
        return Row(self.model, f"{number}, one killed", killed - begun, 0, said + f" left: {left}" * bool(left), good)


def sums(folder: Path) -> dict[str, str]:
    """File -> sha256, of all artifacts."""
    files = sorted(path for path in (folder / "artifacts").rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ranks_of(parent: int) -> dict[str, int]:
    """Rank -> process, of those that ``parent`` started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            owner = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        rank = [word[5:].decode() for word in words if word.startswith(b"RANK=")]
        if owner == parent and rank:
            found[rank[0]] = int(folder.name)
    return found


def numbers_here(device: str) -> list[int]:
    """1, 2, 4, 8, as far as there are cards."""
    if device == "cpu":
        return [1, 2, 4]
    import torch

    return [number for number in (1, 2, 4, 8) if number <= torch.cuda.device_count()]


def main() -> int:
    """Print a table; 1 where anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--numbers", type=int, nargs="+", help="of ranks, the first 1 (default: those that there are)")
    parser.add_argument("--models", nargs="+", choices=("dense", "experts"), default=["dense", "experts"])
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    options = parser.parse_args()
    if options.device == "cpu":  # where the number of threads decides the bytes, ranks and one alone must have as many
        os.environ["OMP_NUM_THREADS"] = "1"
    from small_models import TEXT, make_model  # the tests' small models

    work = Path(tempfile.mkdtemp(prefix="qtool-cards-"))
    rows: list[Row] = []
    try:
        (work / "text.txt").write_text("".join(TEXT.replace("def f", f"def g{number}_") for number in range(24)))
        make_model(work / "dense" / "model", **SIZES)
        make_model(work / "experts" / "model", "Qwen3Moe", **(SIZES | SPARSE))
        numbers = options.numbers or numbers_here(options.device)
        for model in options.models:
            recipe = Recipe(work, model, options.device)
            for number in dict.fromkeys([1, *numbers]):
                rows.append(show(recipe.run(number, str(number))))
            if len(numbers) > 1:
                rows.append(show(recipe.kill(numbers[-1], "killed")))
                rows.append(show(recipe.run(numbers[-2], "killed")))
    finally:
        if options.keep:
            print(work)
        else:
            shutil.rmtree(work, ignore_errors=True)
    good = sum(row.good for row in rows)
    print(f"as one rank alone: {good}/{len(rows)}")
    return 0 if good == len(rows) else 1


def show(row: Row) -> Row:
    """A line of the table."""
    print(f"{row.model:8} {row.ranks:>14} ranks {row.seconds:7.1f} s {row.files:4} files  {row.said}", flush=True)
    return row


if __name__ == "__main__":
    raise SystemExit(main())
