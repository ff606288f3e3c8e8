"""long-combine: two or three definitions of a long file, far from one another, are to be used together."""

from __future__ import annotations

import random

from qtool.evaluate.tasks.depots import INPUTS, check_of, codes, depot
from qtool.evaluate.tasks.made import Puzzle
from qtool.evaluate.tasks.made_benchmark import made_benchmark

NAME = "long-combine"


def puzzle(drawn: random.Random, look_alikes: int) -> Puzzle:
    """The charge of one depot times the weight of another, and in every second problem the charge of a third added."""
    taken: set[str] = set()
    first, second, third = codes(drawn, 3)
    charged, added = depot(drawn, first, taken), depot(drawn, third, taken)
    weight, three = drawn.randrange(3, 90), drawn.random() < 0.5
    name, *names = (f"WEIGHT_{number:04X}" for number in drawn.sample(range(16**4), 1 + look_alikes))
    asked_for = (first, second, third)
    others = [depot(drawn, code, taken).block for code in codes(drawn, look_alikes, first, asked_for)]
    for other, code in zip(names, codes(drawn, look_alikes, second, asked_for), strict=True):
        others.append(weight_block(other, drawn.randrange(3, 90), code))
    needles, answer = [charged.block, weight_block(name, weight, second)], f"{charged.call} * {name}"
    results = [charged.charge(*given) * weight for given in INPUTS]
    if three:
        needles.append(added.block)
        answer += f" + {added.call}"
        results = [result + added.charge(*given) for result, given in zip(results, INPUTS, strict=True)]
    return Puzzle(
        needles=tuple(needles),
        others=tuple(others),
        question=question(first, second, third if three else ""),
        answer=f"    return {answer}\n",
        test=check_of("solve", [f"{units}, {level}" for units, level in INPUTS], results),
    )


def question(charged: str, weighed: str, added: str = "") -> str:
    """The function that is to be written, of the depots with these codes: its head with the docstring."""
    asked = f"The charge of depot {charged} for these units at this level, times the weight of depot {weighed}"
    asked += f", and the charge of depot {added} for the same added to it" if added else ""
    return f'def solve(units, level):\n    """{asked}. Uses what is defined above for these depots."""\n'


def weight_block(name: str, weight: int, code: str) -> str:
    """The constant that says it."""
    return f"# The weight of depot {code}.\n{name} = {weight}"


BENCHMARK = made_benchmark(NAME, puzzle)
