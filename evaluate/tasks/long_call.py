"""long-call: one function of a long file is to be called, which only its docstring tells from its look-alikes."""

from __future__ import annotations

import random

from qtool.evaluate.tasks.depots import INPUTS, check_of, codes, depot
from qtool.evaluate.tasks.made import Puzzle
from qtool.evaluate.tasks.made_benchmark import made_benchmark

NAME = "long-call"


def puzzle(drawn: random.Random, look_alikes: int) -> Puzzle:
    """A depot among others whose codes nearly are its own."""
    taken: set[str] = set()
    (code,) = codes(drawn, 1)
    wanted = depot(drawn, code, taken)
    others = [depot(drawn, other, taken) for other in codes(drawn, look_alikes, code)]
    results = [wanted.charge(*given) for given in INPUTS]
    return Puzzle(
        needles=(wanted.block,),
        others=tuple(other.block for other in others),
        question=question(code),
        answer=f"    return {wanted.call}\n",
        test=check_of("solve", [f"{units}, {level}" for units, level in INPUTS], results),
    )


def question(code: str) -> str:
    """The function that is to be written: its head with the docstring."""
    return (
        f'def solve(units, level):\n    """The charge of depot {code} for these units at this level: calls '
        f'the function above that is for depot {code}."""\n'
    )


BENCHMARK = made_benchmark(NAME, puzzle)
