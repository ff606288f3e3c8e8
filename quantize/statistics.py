"""What calibration keeps of the inputs of a linear: Gram matrices in float32, channel means and maxima."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtool.quantize.precision import bfloat16_products

GRAM_BLOCK = {"cpu": 384, "cuda": 4096}  # columns of a Gram block: only blocks on or above the diagonal are computed


@dataclass
class InputStatistics:
    """Statistics of one distinct linear input X ``[tokens, in]``, accumulated batch by batch.

    gram: XᵀX ``[in, in]``; drift: (S - X)ᵀX ``[in, in]``, S the source's inputs for the same tokens (None on the
    source's own stream); abs_sum (of the source's own stream alone), square_sum, absmax ``[in]``. All float32.
    ``through``: weights W ``[out, in]`` of the linears, where out < in: drift is then W (S - X)ᵀX ``[out, in]``, which
    costs less. ``channels_only``: square_sum alone. Where a gate weighs the tokens, each counts its weight to the power
    ``exponent``: mass is the sum of that, power of the weights' squares, scalars.
    """

    tokens: int = 0
    gram: Tensor = field(default_factory=lambda: torch.empty(0))
    drift: Tensor | None = None
    abs_sum: Tensor = field(default_factory=lambda: torch.empty(0))
    absmax: Tensor = field(default_factory=lambda: torch.empty(0))
    square_sum: Tensor = field(default_factory=lambda: torch.empty(0))
    channels_only: bool = False
    through: Tensor | None = None
    exponent: int = 0
    mass: Tensor | None = None
    power: Tensor | None = None

    def add(
        self,
        inputs: Tensor,
        source: Tensor | None = None,
        divisor: Tensor | None = None,
        behind: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> None:
        """Count a batch ``[..., in]``. ``source``: the source's inputs for the same tokens, to be divided by
        ``divisor [in]``; ``behind`` ``[..., out]``: what the source's hidden states have more, where the outputs are
        added to them (only with ``through``); ``gate`` ``[...]``: what each token's output is multiplied by."""
        x = inputs.flatten(0, -2)
        columns = x.shape[1]
        weighing = gate is not None and self.exponent > 0
        if not self.tokens:
            kept = self.channels_only or (weighing and source is None)  # else the Gram matrix has them
            self.square_sum = torch.zeros(columns if kept else 0, device=x.device)
        if not self.tokens and not self.channels_only:
            self.gram = torch.zeros(columns, columns, device=x.device)
            self.abs_sum = torch.zeros(columns, device=x.device)
            self.absmax = torch.zeros(columns, device=x.device)
            if source is not None:
                rows = columns if self.through is None else self.through.shape[0]
                self.drift = torch.zeros(rows, columns, device=x.device)
        self.tokens += x.shape[0]
        if len(self.square_sum):
            self.square_sum += torch.ones(x.shape[0], device=x.device) @ x.float().square()  # faster than a norm
        if self.channels_only:
            return
        counted = None if gate is None else self._count(gate.flatten().float())
        low, high = x.aminmax(dim=0)
        self.absmax = torch.stack([self.absmax, high.float(), -low.float()]).amax(0)
        if source is None:
            self.abs_sum += x.abs().sum(0, dtype=torch.float32) if counted is None else counted @ x.abs().float()
        root = counted.sqrt().to(x.dtype).unsqueeze(1) if counted is not None and weighing else None
        with bfloat16_products() if x.dtype == torch.bfloat16 else nullcontext():  # exact: the factors are bfloat16
            wide = x if root is None else x * root
            wide = wide if x.is_cuda else wide.float()
            accumulate_gram(self.gram, wide)
            if self.drift is not None and source is not None:
                gap = gap_of(source.flatten(0, -2), x, divisor)
                if self.through is not None:
                    gap = gap @ self.through.t().to(gap.dtype)
                gap = gap if behind is None else gap + behind.flatten(0, -2)
                gap = gap if root is None else gap * root
                accumulate(self.drift, gap if x.is_cuda else gap.float(), wide)

    def finish(self) -> None:
        """Make the Gram matrix whole: the blocks below the diagonal are those above it, transposed."""
        for start, stop in [] if self.channels_only else blocks_of(self.gram):
            self.gram[stop:, start:stop] = self.gram[start:stop, stop:].t()

    def _count(self, gate: Tensor) -> Tensor:
        """What each token counts ``[tokens]``."""
        counted = gate**self.exponent
        mass, power = counted.sum(), gate.square().sum()
        self.mass = mass if self.mass is None else self.mass + mass
        self.power = power if self.power is None else self.power + power
        return counted

    @property
    def mean_abs(self) -> Tensor:
        """mean|x| ``[in]``."""
        return self.abs_sum / (self.tokens if self.mass is None else self.mass.clamp_min(1e-30))

    @property
    def first_unsound(self) -> int:
        """Of a stack the first problem whose inputs were NaN or Inf; 0 where none's were."""
        return 0

    @property
    def counted(self) -> float:
        """What a squared output error costs that the Gram matrix tells, beside those of experts: it enters the layer's
        sum with the gate's square, whatever power the tokens have here."""
        if self.mass is None or self.power is None:
            return 1.0
        return float(self.power / self.mass.clamp_min(1e-30))

    @property
    def overall_abs(self) -> Tensor:
        """As `mean_abs`, of one input as of experts' `[in]`."""
        return self.mean_abs

    @property
    def mean_square(self) -> Tensor:
        """mean x² ``[in]``: what an importance matrix holds, every token counted alike; of a stream that drifts as its
        Gram matrix counts them."""
        if len(self.square_sum):
            return self.square_sum / self.tokens
        weighed = self.mass is not None and self.exponent > 0
        return self.gram.diagonal() / (self.mass.clamp_min(1e-30) if weighed and self.mass is not None else self.tokens)

    def output_drift(self, weight: Tensor) -> Tensor:
        """``W (C - G)`` ``[out, in]`` for C = SᵀX: what the source's outputs have in common with these inputs, less
        what W makes of them. ``weight``: the W of ``through`` where that was given."""
        assert self.drift is not None
        return self.drift if self.through is not None else weight @ self.drift


def gap_of(source: Tensor, inputs: Tensor, divisor: Tensor | None) -> Tensor:
    """What the source's inputs, divided, have more."""
    return source - inputs if divisor is None else (source / divisor - inputs).to(inputs.dtype)


def accumulate_gram(total: Tensor, x: Tensor) -> None:
    """total += xᵀx, on and above the diagonal's blocks."""
    for start, stop in blocks_of(total):
        accumulate(total[start:stop, start:], x[:, start:stop], x[:, start:])


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += leftᵀ right, summed in float32 whatever the inputs' dtype (float32 on the CPU)."""
    if left.dtype != torch.float32:
        total += torch.mm(left.t(), right, out_dtype=torch.float32)
    else:
        total.addmm_(left.t(), right)


def blocks_of(gram: Tensor) -> Iterator[tuple[int, int]]:
    """(first column, end) of the blocks in which a Gram matrix is summed."""
    columns, step = gram.shape[0], GRAM_BLOCK[gram.device.type]
    for start in range(0, columns, step):
        yield start, min(start + step, columns)
