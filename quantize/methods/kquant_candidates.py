"""The scales that llama.cpp's block search tries, and the sizes at which it stops (ggml/src/ggml-quants.c): for the
plain PyTorch search and for the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-15  # a block whose largest value is below this is zero

FLAT = 1e-37  # a range below this has no finite inverse

HALF_MAX = 65504.0


@dataclass(frozen=True)
class AffineSearch:
    """Candidates for ``levels / (max - min)``: ``(first + step * i + levels) / (max - min)``, i = 0…last."""

    levels: int
    first: float
    step: float
    last: int

    def numerators(self) -> list[float]:
        """The candidates' numerators, rounded to float32 after every operation as C does."""
        first, step = torch.tensor(self.first), torch.tensor(self.step)
        return [float(first + step * i + self.levels) for i in range(self.last + 1)]


WEIGHED = {"Q4_K": AffineSearch(15, -0.9, 0.05, 36), "Q5_K": AffineSearch(31, -0.9, 0.05, 36)}

PLAIN = {"Q4_K": AffineSearch(15, -1.0, 0.1, 20), "Q5_K": AffineSearch(31, -0.5, 0.1, 15)}

LOW = AffineSearch(3, -0.9, 0.05, 36)  # of Q2_K, weighed

TRIES = 7  # uneven levels: so many scales on each side of the one that maps the largest value to the first level


@dataclass(frozen=True)
class Searched:
    """Of sub-blocks ``[subs, super-blocks]``: scale and minimum as found; ``codes [n, subs, super-blocks]`` at them,
    which stand where a stored step is 0. Of super-blocks ``d, dmin [super-blocks]``, not rounded yet, and of their
    sub-blocks the multiples ``steps, minima``."""

    d: Tensor
    dmin: Tensor
    steps: Tensor
    minima: Tensor
    codes: Tensor
