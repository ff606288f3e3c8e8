"""long-change: two versions of a long file differ in one number of one function; which, and what is it now?

Look-alikes are functions of which only the comment was changed. The answer may use nothing of the file: a program that
compares the versions itself finds none.
"""

from __future__ import annotations

import random

from qtool.evaluate.tasks.depots import Depot, check_of, codes, depot
from qtool.evaluate.tasks.made import APART, Making, Puzzle, fill
from qtool.evaluate.tasks.made_benchmark import made_benchmark

NAME = "long-change"
SEPARATOR = "# ---- {} version of the file ----"
QUESTION = '''def changed():
    """Of the functions above one has another number in the second version of the file than in the first; comments may
    have changed, too. Returns (name of the function, its new number)."""
'''


def puzzle(drawn: random.Random, look_alikes: int) -> Puzzle:
    """Needles: the function before and after; others: pairs of the same function under two comments."""
    taken: set[str] = set()
    first, *rest = codes(drawn, 1 + look_alikes)
    before = depot(drawn, first, taken)
    after, new = altered(drawn, before)
    others = []
    for code in rest:
        others += commented(drawn, depot(drawn, code, taken).block)
    return Puzzle(
        needles=(before.block, after.block), others=tuple(others), question=QUESTION,
        answer=f"    return ({before.name!r}, {new})\n", test=check_of("changed", [""], [(before.name, new)]),
        entry="changed", usable=False,
    )  # fmt: skip


def altered(drawn: random.Random, before: Depot) -> tuple[Depot, int]:
    """The depot with another number at one place, and that number."""
    place = drawn.randrange(len(before.numbers))
    new = before.numbers[place]
    while new in before.numbers:
        new = drawn.randrange(11, 9973)
    numbers = tuple(new if i == place else number for i, number in enumerate(before.numbers))
    return Depot(before.code, before.name, before.keyword, numbers), new  # type: ignore[arg-type]  # four, as before


def commented(drawn: random.Random, block: str) -> list[str]:
    """The same block under two comments."""
    return [f"# Checked in {year}.\n{block}" for year in drawn.sample(range(1990, 2020), 2)]


def lay(drawn: random.Random, hidden: Puzzle, depth: float, tokens: int, making: Making) -> list[str]:
    """Both versions whole, one behind the other: ``depth`` is a place in each of them."""
    size = sum(making.count([block + APART for block in (*hidden.needles, *hidden.others)]))
    filler = fill(drawn, (tokens - size) // 2, making)
    at = round(depth * len(filler))
    places = [drawn.randrange(len(filler) + 1) for _ in hidden.others[::2]]
    versions = []
    for version, named in enumerate(("First", "Second")):
        blocks = list(filler)
        inserted = [(at, hidden.needles[version]), *zip(places, hidden.others[version::2], strict=True)]
        for place, block in sorted(inserted, key=lambda pair: -pair[0]):
            blocks.insert(place, block)
        versions += [SEPARATOR.format(named), *blocks]
    return versions


BENCHMARK = made_benchmark(NAME, puzzle, lay)
