"""A benchmark whose problems are made: what all of these have in common."""

from __future__ import annotations

import random
from collections.abc import Callable

from qtool.evaluate.tasks import made
from qtool.evaluate.tasks.benchmark import Benchmark


def made_benchmark(
    name: str, puzzle: Callable[[random.Random, int], made.Puzzle], lay: made.Lay | None = None
) -> Benchmark:
    """Problems at every length and depth, with look-alikes and without; ``puzzle``, ``lay``: as `made.make_problems`
    takes them."""
    return Benchmark(
        format=name, data_sets={}, read=made.no_rows, make=lambda making: made.make_problems(name, making, puzzle, lay),
        finished=made.finished, from_text=made.from_text, from_reply=made.from_reply, self_checked=made.checked,
    )  # fmt: skip
