"""Whether several cards make the bytes of one: a small recipe with 1, 2, 4 … ranks, one of them killed in the middle.

    python scripts/check_cards.py                     # as many cards as there are: 1, 2, 4, 8
    python scripts/check_cards.py --device cpu        # ranks on the processor, over gloo: 1, 2, 4
    python scripts/check_cards.py --numbers 1 2 --only experts scores       # two cards, two minutes
    python scripts/check_cards.py --numbers 1 2 --only crews --keep

Sets (``--only``), each a random model but for the last:
  dense    four layers: AWQ and GPTQ with and without a stream of their own, NF4 where bitsandbytes is installed, Q4_K_M
           by descent and by importance
  experts  a mixture, four layers: AWQ, GPTQ, Q4_K_M by importance
  crews    matrices that are rounded in pieces (hidden 2048, two layers), each output by itself, so that ranks help
  scores   the demo model's outputs and source, answering problems and held-out text: equal to one process's
Every file of every artifact is compared by sha256 with those of one rank, the manifests too; the largest number of
ranks begins, because they compile kernels side by side. Of dense and experts a rank is then killed (SIGKILL) once a
layer is noted, and the same recipe goes on with another number. Prints a table; 1 where anything differed. No network
is needed.
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
from collections.abc import Iterator, Mapping
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
WIDE = SIZES | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2}
GRID = {"group_size": 32, "dtype": "bfloat16"}
SETS = ("dense", "experts", "crews", "scores")
SCORED: list[dict[str, object]] = [  # nothing that compiles for long
    {"method": "awq", "scaling": "none", "rounding": "rtn"}, {"method": "gptq", "descent": False},
]  # fmt: skip
JUDGED = {
    "tasks": [{"task": "heldout", "limit": 16}], "max_new_tokens": 64,
    "text": {"text": "heldout-code", "samples": 8, "length": 128},
}  # fmt: skip
# The command as ranks on a processor, which `--gpus` refuses
ON_CPU = (
    "import os, sys; from qtool.cli.cards import launch; sys.exit(launch(sys.argv[2:], int(sys.argv[1]), os.environ))"
)


@dataclass
class Row:
    """One run: of which set, by how many ranks, how it ended, and whether that is as it should be."""

    what: str
    ranks: str
    seconds: float
    files: int
    said: str
    good: bool


def outputs_of(what: str, device: str) -> list[dict[str, object]]:
    """Of a set's recipe."""
    blocks = find_spec("gguf") and (device == "cuda" or find_spec("xllamacpp"))
    found: list[dict[str, object]] = [{"method": "awq", **GRID}, {"method": "gptq", **GRID}]
    if what == "dense":
        found += [{"method": "awq", "name": "awq-source", "propagate_error": False, "rounding": "rtn", **GRID}]
    if blocks and what != "experts":
        found += [{"method": "gguf"}]
    if blocks and what != "crews":
        found += [{"method": "gguf", "name": "ggml", "rounding": "ggml"}]
    if find_spec("bitsandbytes") and what != "experts":
        found += [{"method": "nf4"}]
    return found


class Recipe:
    """A recipe in a folder of its own, ``what``: its line of the table."""

    def __init__(
        self, work: Path, what: str, model: str, device: str, outputs: list[dict[str, object]], **more: object
    ) -> None:
        self.folder, self.device, self.what, self.outputs = work / what, device, what, outputs
        self.asked = {
            "model": model, "outputs": outputs,
            "calibration": {"text": str(work / "text.txt"), "samples": SAMPLES[device], "length": LENGTH}, **more,
        }  # fmt: skip

    def command(self, number: int, case: str) -> list[str]:
        """`qtool run` of a fresh or begun folder ``case``."""
        place = self.folder / case
        place.mkdir(parents=True, exist_ok=True)
        asked = self.asked | {"output_dir": str(place / "artifacts")}
        (place / "r.yaml").write_text(json.dumps(asked))
        words = ["run", str(place / "r.yaml"), "--runs", str(place / "runs"), "--device", self.device]
        if number == 1:
            return [sys.executable, "-m", "qtool", *words]
        if self.device == "cuda":
            return [sys.executable, "-m", "qtool", *words, "--gpus", str(number)]
        return [sys.executable, "-c", ON_CPU, str(number), *words]

    def run(self, number: int, case: str, compared: bool = True) -> Row:
        """Run it to its end."""
        begun = time.monotonic()
        done = subprocess.run(self.command(number, case), capture_output=True, text=True, check=False)
        seconds = time.monotonic() - begun
        found = sums(self.folder / case)
        if done.returncode:
            said = f"exit code {done.returncode}: {done.stderr.strip()[-600:]}"
            return Row(self.what, str(number), seconds, len(found), said, False)
        if not compared:
            return Row(self.what, str(number), seconds, len(found), "made", bool(found))
        return self.compared(case, str(number), seconds)

    def rows(self, numbers: list[int], killing: bool) -> Iterator[Row]:
        """The most ranks first, then one, to which all others are compared."""
        *_, most = numbers
        if most > 1:
            yield self.run(most, str(most), compared=False)
        yield self.run(1, "1", compared=False)
        if most > 1:
            yield self.compared(str(most), f"{most} against 1")
        for number in numbers:
            if number not in (1, most):
                yield self.run(number, str(number))
        if most > 1 and killing:
            yield self.kill(most, "killed")
            yield self.run(numbers[-2], "killed")

    def compared(self, case: str, ranks: str, seconds: float = 0.0) -> Row:
        """What ``case`` made beside what one rank made."""
        found, alone = sums(self.folder / case), sums(self.folder / "1")
        differing = sorted(name for name in found.keys() | alone.keys() if found.get(name) != alone.get(name))
        said = f"differ: {', '.join(differing[:4])}" if differing else "equal"
        return Row(self.what, ranks, seconds, len(found), said, not differing and bool(found))

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
        return Row(self.what, f"{number}, one killed", killed - begun, 0, said + f" left: {left}" * bool(left), good)


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
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS), help="sets, in this order")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    options = parser.parse_args()
    if options.device == "cpu":  # where the number of threads decides the bytes, ranks and one alone must have as many
        os.environ["OMP_NUM_THREADS"] = "1"
    from small_models import TEXT, make_model  # the tests' small models

    work = Path(tempfile.mkdtemp(prefix="qtool-cards-"))
    models: dict[str, tuple[str, Mapping[str, object]]] = {
        "dense": ("Llama", SIZES), "experts": ("Qwen3Moe", SIZES | SPARSE), "crews": ("Llama", WIDE)
    }  # fmt: skip
    rows: list[Row] = []
    try:
        (work / "text.txt").write_text("".join(TEXT.replace("def f", f"def g{number}_") for number in range(24)))
        numbers = sorted({1, *(options.numbers or numbers_here(options.device))})
        for what in options.only:
            if what in models:
                family, sizes = models[what]
                make_model(work / what / "model", family, "1GB", **sizes)
            for recipe in recipes_of(work, what, options.device):
                rows += map(show, recipe.rows(numbers, what in ("dense", "experts")))
                if what == "scores":
                    rows += [show(scored(recipe, number)) for number in numbers[1:]]
    finally:
        if options.keep:
            print(work)
        else:
            shutil.rmtree(work, ignore_errors=True)
    good = sum(row.good for row in rows)
    print(f"as one rank alone: {good}/{len(rows)}")
    return 0 if good == len(rows) else 1


def recipes_of(work: Path, what: str, device: str) -> Iterator[Recipe]:
    """A set's; of crews one for each output."""
    model, outputs = str(work / what / "model"), outputs_of(what, device)
    if what == "scores":
        yield Recipe(work, what, "qtool-demo", device, SCORED, evaluate=JUDGED)
    elif what == "crews":
        for output in outputs:
            yield Recipe(work, f"crews-{output['method']}", model, device, [output])
    else:
        yield Recipe(work, what, model, device, outputs)


def scored(recipe: Recipe, number: int) -> Row:
    """Whether several ranks' scores are those of one, to the digit; the source's on the first, the next one's on the
    second."""
    from qtool.runs.record import load_run

    found = [
        load_run(next((recipe.folder / case / "runs").glob("*/result.json")).parent).summary.models
        for case in ("1", str(number))
    ]
    alone, several = ({name: (model.tasks, model.text) for name, model in models.items()} for models in found)
    differing = [name for name in alone.keys() | several.keys() if alone.get(name) != several.get(name)]
    said = f"scores differ: {', '.join(differing)}" if differing else f"scores of {len(alone)} models equal"
    return Row(recipe.what, f"{number} against 1", 0.0, 0, said, not differing and len(alone) == len(SCORED) + 1)


def show(row: Row) -> Row:
    """A line of the table."""
    print(f"{row.what:10} {row.ranks:>14} ranks {row.seconds:7.1f} s {row.files:4} files  {row.said}", flush=True)
    return row


if __name__ == "__main__":
    raise SystemExit(main())
