"""The tables of docs/sizing.md, made by `qtool plan`'s own functions.

python scripts/sizing_tables.py            # print them
python scripts/sizing_tables.py --write    # put them into docs/sizing.md
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from qtool.sizing.accelerators import choose, load_accelerators
from qtool.sizing.headers import read_headers
from qtool.sizing.plan import Answer, Question, gib, make_plan

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("IQuest-Coder-V1-7B", "IQuest-Coder-V1-14B", "IQuest-Coder-V1-40B", "IQuest-Coder-V1-40B-Loop")
FORMATS = ("source", "awq", "gptq", "nf4", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
CONTEXTS = (2048, 8192, 32768, 65536, 131072)
CARDS = "RTX4090,H100"


def table(model: str) -> str:
    """A row for each format: weights, memory of one sequence at each context, longest context and decode bound on each
    card."""
    headers = read_headers(str(ROOT / "tests" / "data" / "iquest" / model))
    cards = choose(load_accelerators(), CARDS)
    plan = make_plan(headers, Question(cards, contexts=CONTEXTS, sequences=(1,), formats=FORMATS))
    titles = ["format", "engine", "weights GiB", "bpw", *(f"{context // 1024}K" for context in CONTEXTS)]
    for card in cards:
        titles += [f"longest on {card.key}", f"tok/s at 8K on {card.key}, at most"]
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "---:|" * (len(titles) - 2)]
    by_format: dict[tuple[str, str], list[Answer]] = {}
    for answer in plan.answers:
        by_format.setdefault((answer.setting.weights.format, answer.setting.engine), []).append(answer)
    for (name, engine), answers in by_format.items():
        weights = answers[0].setting.weights
        h100 = answers[-1]
        row = [name, engine, gib(weights.nbytes), f"{weights.bits_per_weight:.2f}"]
        row += [f"{cell.total / 2**30:.1f}" for cell in h100.cells]
        for answer in answers:
            eight = next(cell for cell in answer.cells if cell.context == 8192)
            held = answer.context >= min(CONTEXTS)
            row += [f"{answer.context:,}" if held else "-"]
            row += [f"{eight.step.per_second(1).best:.0f}" if eight.fits else "-"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """``text`` with every ``<!-- plan NAME -->`` block made anew."""

    def fill(found: re.Match[str]) -> str:
        return f"<!-- plan {found[1]} -->\n{table(found[1])}\n<!-- end -->"

    return re.sub(r"<!-- plan (\S+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into docs/sizing.md")
    path = ROOT / "docs" / "sizing.md"
    if parser.parse_args().write:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for model in MODELS:
        print(f"{model}\n\n{table(model)}\n")


if __name__ == "__main__":
    main()
