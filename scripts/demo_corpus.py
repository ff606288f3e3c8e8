"""Writes the data that ship with qtool: the held-out problems and the two text corpora.

    python scripts/demo_corpus.py

* evaluate/data/heldout.jsonl.gz: problems in HumanEval's format, compositions that training never shows
* evaluate/data/heldout_code.jsonl: text for perplexity and KL, from the held-out side of the split too
* quantize/data/calibration.jsonl: text for calibration, from the training side
"""

import argparse
import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo_programs import Program, is_held_out, literal, programs, training_texts
from demo_snippets import snippets

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = ROOT / "evaluate/data/heldout.jsonl.gz"
HELD_OUT_CODE = ROOT / "evaluate/data/heldout_code.jsonl"
CALIBRATION = ROOT / "quantize/data/calibration.jsonl"

PROBLEMS = {1: 50, 2: 90, 3: 160, 4: 200, 5: 260, 6: 260, 7: 180}  # number of operations -> problems
LEVELS = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 5}  # number of operations -> level
MOST_PER_COMPOSITION = 6  # few single operations are held out; longer chains hardly ever repeat
LONGEST_SOLUTION = 200  # characters; about 60 tokens of the demo model
CALIBRATION_BYTES, HELD_OUT_CODE_BYTES = 400_000, 120_000


def problem(program: Program, number: int) -> dict[str, Any]:
    """One line of the task file."""
    asserts = []
    for inputs, result in program.cases:
        arguments = ", ".join(literal(value) for value in inputs)
        asserts.append(f"    assert candidate({arguments}) == {literal(result)}\n")
    return {
        "task_id": f"heldout/{number}",
        "prompt": program.prompt,
        "entry_point": program.entry_point,
        "canonical_solution": program.body,
        "test": "def check(candidate):\n" + "".join(asserts),
        "level": LEVELS[len(program.operations)],
        "composition": list(program.composition),
    }


def held_out_problems(sizes: dict[int, int] = PROBLEMS) -> list[dict[str, Any]]:
    """The task: shorter chains first, no prompt twice; `sizes` is number of operations -> problems."""
    problems: list[dict[str, Any]] = []
    prompts: set[str] = set()
    uses: Counter[tuple[str, ...]] = Counter()
    for length, wanted in sizes.items():
        found = 0
        for program in programs(f"heldout/{length}", held_out=True, lengths={length: 1}):
            if program.prompt in prompts or len(program.body) > LONGEST_SOLUTION:
                continue
            if uses[program.composition] >= (MOST_PER_COMPOSITION if length == 1 else 1):
                continue
            prompts.add(program.prompt)
            uses[program.composition] += 1
            problems.append(problem(program, len(problems)))
            found += 1
            if found == wanted:
                break
    return problems


def read_problems(path: Path = HELD_OUT) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def forbidden_texts(problems: list[dict[str, Any]]) -> frozenset[str]:
    """What the training stream must not contain: the problems' prompts and solutions."""
    return frozenset(str(p[key]) for p in problems for key in ("prompt", "canonical_solution"))


def text_rows(texts: Iterator[str], size: int, seed: str, held_out: bool, row: int) -> list[dict[str, str]]:
    """Rows of at least `row` characters, three of programs to one of other code; `size` characters in all."""
    rng = random.Random(seed)
    other = (text for key, text in snippets(rng) if is_held_out(key) == held_out)
    rows: list[dict[str, str]] = []
    written = 0
    while written < size:
        stream = other if len(rows) % 4 == 3 else texts
        text = next(stream)
        while len(text) < row:
            text += "\n" + next(stream)  # a blank line between two
        rows.append({"text": text})
        written += len(text)
    return rows


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    problems = held_out_problems()
    text = "".join(json.dumps(row) + "\n" for row in problems)
    HELD_OUT.parent.mkdir(parents=True, exist_ok=True)
    HELD_OUT.write_bytes(gzip.compress(text.encode(), mtime=0))
    forbidden = forbidden_texts(problems)
    others = (p.prompt + p.body for p in programs("heldout/code", held_out=True) if p.prompt not in forbidden)
    write_lines(HELD_OUT_CODE, text_rows(others, HELD_OUT_CODE_BYTES, "heldout/other", True, row=1))
    training = training_texts("calibration", forbidden)
    write_lines(CALIBRATION, text_rows(training, CALIBRATION_BYTES, "calibration/other", False, row=1200))
    for path in (HELD_OUT, HELD_OUT_CODE, CALIBRATION):
        print(path.relative_to(ROOT), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()[:12])


if __name__ == "__main__":
    main()
