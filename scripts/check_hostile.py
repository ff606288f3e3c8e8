"""Every hostile input of tests/attacks, each met by a forked `qtool` under limits of time and memory.

    .venv/bin/python scripts/check_hostile.py               all of them: half an hour on two cores
    .venv/bin/python scripts/check_hostile.py gguf pipe     those whose name holds one of the words
    .venv/bin/python scripts/check_hostile.py --list        their names

The last line is `refused well n/N`; exit code 1 where one was not.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
HEAVY = (
    "torch", "transformers", "bitsandbytes", "gguf", "datasets", "qtool.cli", "qtool.run", "qtool.report.terminal",
    "qtool.share.publish", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only attacks whose name holds one of them")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--seconds", type=float, default=45.0, help="what one command may take")
    arguments = parser.parse_args()
    from attacks import all_attacks

    chosen = [a for a in all_attacks() if not arguments.words or any(word in a.label for word in arguments.words)]
    if arguments.list:
        print("\n".join(attack.label for attack in chosen))
        return
    with tempfile.TemporaryDirectory(prefix="qtool-hostile-") as folder:
        os.environ |= {
            "HF_HOME": f"{folder}/hf", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false", "TMPDIR": folder,
        }  # fmt: skip
        for name in HEAVY:  # once, before the forks
            importlib.import_module(name)
        sys.exit(bool(attack_all(chosen, Path(folder), arguments.seconds)))


def attack_all(chosen: list[Any], folder: Path, seconds: float) -> int:
    """Print a line for each attack and the sum; the number of bad answers."""
    from attacks.running import command, faults, prepare

    bench = prepare(folder / "bench")
    bad: list[str] = []
    for attack in chosen:
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        bench.canary.unlink(missing_ok=True)
        answer = command(attack.build(bench, work), work, seconds)
        found = faults(attack, answer, bench, work)
        said = [line for line in answer.output.splitlines() if line.strip()]
        last = ascii(said[-1][:150])[1:-1] if said else ""
        line = f"{attack.label}: {'; '.join(found) or f'exit {answer.code}'} ({answer.seconds:.1f} s) | {last}"
        print(f"{'BAD ' if found else 'good'} {line}", flush=True)
        bad += [line] if found else []
    if bad:
        print("\nNot refused well:\n" + "\n".join(bad))
    print(f"refused well {len(chosen) - len(bad)}/{len(chosen)}")
    return len(bad)


if __name__ == "__main__":
    main()
