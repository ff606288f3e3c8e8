"""What long problems hide: the charge of a depot, as a function that only its docstring tells from the others."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

CITIES = ("LIMA", "OSLO", "CAIRO", "QUITO", "SEOUL", "TUNIS", "DELHI", "PERTH", "DAKAR", "HANOI", "MINSK", "SOFIA")
KEYWORDS = ("grade", "zone", "band", "tier", "rank", "class_", "stage", "phase")
NEAREST = 20  # look-alikes that differ in one thing: there are no more than 34
INPUTS = ((3, 1), (17, 4), (250, 2), (1021, 9), (64, 0))  # units, level


@dataclass(frozen=True)
class Depot:
    """``code``: by which it is asked for; ``name``: of its function; ``keyword``: of the function's second argument;
    ``numbers``: of the charge."""

    code: str
    name: str
    keyword: str
    numbers: tuple[int, int, int, int]

    @property
    def block(self) -> str:
        """Its function."""
        a, b, c, modulus = self.numbers
        return (
            f'def {self.name}(units, *, {self.keyword}):\n    """The charge of depot {self.code}."""\n'
            f"    charge = units * {a} + {self.keyword} * {b}\n    if units > 100:\n        charge -= {c}\n"
            f"    return charge % {modulus}"
        )

    def charge(self, units: int, level: int) -> int:
        """What its function gives."""
        a, b, c, modulus = self.numbers
        return (units * a + level * b - (c if units > 100 else 0)) % modulus

    @property
    def call(self) -> str:
        """As the question's answer calls it."""
        return f"{self.name}(units, {self.keyword}=level)"


def depot(drawn: random.Random, code: str, taken: set[str]) -> Depot:
    """One with a name and numbers of its own."""
    while (name := f"charge_{drawn.randrange(16**4):04x}") in taken:
        pass
    taken.add(name)
    numbers = (drawn.randrange(3, 97), drawn.randrange(101, 997), drawn.randrange(11, 499), drawn.randrange(5003, 9973))
    return Depot(code, name, drawn.choice(KEYWORDS), numbers)


def codes(drawn: random.Random, number: int, alike: str = "", but: Collection[str] = ()) -> list[str]:
    """Different codes, `Q7-LIMA`, none of ``but``; those ``alike`` another differ from it in a letter, a digit or the
    city alone; of many the later ones in two of these."""
    found: dict[str, None] = {}
    while len(found) < number:
        letter, digit, city = drawn.choice("BDFGKLMNPQRTVXZ"), drawn.randrange(10), drawn.choice(CITIES)
        if alike:
            other = drawn.sample(range(3), 1 if len(found) < NEAREST else 2)
            letter = letter if 0 in other else alike[0]
            digit = digit if 1 in other else int(alike[1])
            city = city if 2 in other else alike[3:]
        if (code := f"{letter}{digit}-{city}") != alike and code not in but:
            found[code] = None
    return list(found)


def check_of(entry: str, calls: Sequence[str], results: Sequence[object]) -> str:
    """A test that compares each call's result."""
    lines = [f"    assert candidate({call}) == {result!r}" for call, result in zip(calls, results, strict=True)]
    return "\n".join(["def check(candidate):", *lines, ""])
