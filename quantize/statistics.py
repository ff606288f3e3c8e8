"""What calibration keeps of the inputs of a linear: Gram matrices in float32, channel means and maxima."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

GRAM_BLOCK = {"cpu": 384, "cuda": 4096}  # columns of a Gram block: only blocks on or above the diagonal are computed


@dataclass
class InputStatistics:
    """Statistics of one distinct linear input X ``[tokens, in]``, accumulated batch by batch.

    gram: XᵀX ``[in, in]``; cross: SᵀX ``[in, in]``, S the source's inputs for the same tokens (None on the source's own
    stream); abs_sum, square_sum, absmax ``[in]``. All float32. ``channels_only``: square_sum alone.
    """

    tokens: int = 0
    gram: Tensor = field(default_factory=lambda: torch.empty(0))
    cross: Tensor | None = None
    abs_sum: Tensor = field(default_factory=lambda: torch.empty(0))
    absmax: Tensor = field(default_factory=lambda: torch.empty(0))
    square_sum: Tensor = field(default_factory=lambda: torch.empty(0))
    channels_only: bool = False

    def add(self, inputs: Tensor, source: Tensor | None = None) -> None:
        """Count a batch ``[..., in]``; ``source``: the source's inputs for the same tokens."""
        x = inputs.flatten(0, -2)
        if not self.tokens:
            columns = x.shape[1]
            if not self.channels_only:
                self.gram = torch.zeros(columns, columns, device=x.device)
            self.square_sum = torch.zeros(columns, device=x.device)
            self.abs_sum = torch.zeros(columns, device=x.device)
            self.absmax = torch.zeros(columns, device=x.device)
            if source is not None:
                self.cross = torch.zeros(columns, columns, device=x.device)
        self.tokens += x.shape[0]
        self.square_sum += torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()
        if self.channels_only:
            return
        magnitude = x.abs()
        self.abs_sum += magnitude.sum(0, dtype=torch.float32)
        torch.maximum(self.absmax, magnitude.amax(0), out=self.absmax)
        del magnitude
        _accumulate_gram(self.gram, x)
        if self.cross is not None and source is not None:
            _accumulate(self.cross, source.flatten(0, -2), x)

    def finish(self) -> None:
        """Make the Gram matrix whole: the blocks below the diagonal are those above it, transposed."""
        for start, stop in [] if self.channels_only else _blocks(self.gram):
            self.gram[stop:, start:stop] = self.gram[start:stop, stop:].t()

    @property
    def mean_abs(self) -> Tensor:
        """mean|x| ``[in]``."""
        return self.abs_sum / self.tokens

    @property
    def mean_square(self) -> Tensor:
        """mean x² ``[in]``: what an importance matrix holds, and the Gram matrix's diagonal over the tokens."""
        return self.square_sum / self.tokens


def _accumulate_gram(total: Tensor, x: Tensor) -> None:
    for start, stop in _blocks(total):
        _accumulate(total[start:stop, start:], x[:, start:stop], x[:, start:])


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += leftᵀ right, in float32 whatever the inputs' dtype."""
    if left.is_cuda and left.dtype != torch.float32:
        total += torch.mm(left.t(), right, out_dtype=torch.float32)
    else:
        total.addmm_(left.t().float(), right.float())


def _blocks(gram: Tensor) -> Iterator[tuple[int, int]]:
    columns, step = gram.shape[0], GRAM_BLOCK[gram.device.type]
    for start in range(0, columns, step):
        yield start, min(start + step, columns)
