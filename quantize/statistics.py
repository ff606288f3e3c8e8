"""What calibration keeps of the inputs of a linear: Gram matrices in float32, channel means and maxima."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtool.quantize.crew import WHOLE, Pieces
from qtool.quantize.precision import bfloat16_products
from qtool.quantize.ranks import HERE, Home

GRAM_BLOCK = {"cpu": 384, "cuda": 4096}  # columns of a Gram block: only blocks on or above the diagonal are computed


@dataclass
class InputStatistics:
    """Statistics of one distinct linear input X ``[tokens, in]``, accumulated batch by batch.

    gram: XᵀX ``[in, in]``; drift: (S - X)ᵀX ``[in, in]``, S the source's inputs for the same tokens (None on the
    source's own stream); abs_sum (of the source's own stream alone), square_sum, absmax ``[in]``. All float32.
    ``through``: weights W ``[out, in]`` of the linears, where out < in: drift is then W (S - X)ᵀX ``[out, in]``, which
    costs less. ``channels_only``: square_sum alone. Where a gate weighs the tokens, each counts its weight to the power
    ``exponent``: mass is the sum of that, power of the weights' squares, scalars. Every rank adds its batches, or none
    of no tokens; the sums are at ``home`` alone, in the order of the batches.
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
    home: Home = HERE
    _begun: bool = False

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
        weighing = gate is not None and self.exponent > 0
        if not self._begun:
            kept = self.channels_only or (weighing and source is None)  # else the Gram matrix has them
            self._begin(x, kept, source is not None, gate is not None)
        add = self.home.add
        self.tokens += x.shape[0]
        if len(self.square_sum):
            add(self.square_sum, torch.ones(x.shape[0], device=x.device) @ x.float().square())  # faster than a norm
        if self.channels_only:
            return
        counted = None if gate is None else self._count(gate.flatten().float())
        for largest in self.home.parts(magnitudes(x)):
            self.absmax = torch.maximum(self.absmax, largest)
        if source is None:
            add(self.abs_sum, x.abs().sum(0, dtype=torch.float32) if counted is None else counted @ x.abs().float())
        root = counted.sqrt().to(x.dtype).unsqueeze(1) if counted is not None and weighing else None
        with bfloat16_products() if x.dtype == torch.bfloat16 else nullcontext():  # exact: the factors are bfloat16
            wide = x if root is None else x * root
            wide = wide if x.is_cuda else wide.float()
            add_gram(self.home, self.gram, wide)
            if self.drift is not None and source is not None:
                gap = gap_of(source.flatten(0, -2), x, divisor)
                if self.through is not None:
                    gap = gap @ self.through.t().to(gap.dtype)
                gap = gap if behind is None else gap + behind.flatten(0, -2)
                gap = gap if root is None else gap * root
                add(self.drift, product(gap if x.is_cuda else gap.float(), wide))

    def finish(self) -> None:
        """All tokens are counted. Make the Gram matrix whole: the blocks below the diagonal are those above it,
        transposed."""
        (self.tokens,) = self.home.ranks.count([self.tokens])
        if self.home.mine and not self.channels_only:
            fill_below(self.gram)

    def _begin(self, x: Tensor, squares: bool, drifting: bool, weighed: bool) -> None:
        """Sums of inputs like ``x [tokens, in]``."""
        self._begun = True
        zeros, device, columns = self.home.zeros, x.device, x.shape[1]
        self.square_sum = zeros(columns if squares else 0, device=device)
        if self.channels_only:
            return
        self.gram = zeros(columns, columns, device=device)
        self.abs_sum = zeros(columns, device=device)
        self.absmax = zeros(columns, device=device)
        if drifting:
            self.drift = zeros(columns if self.through is None else self.through.shape[0], columns, device=device)
        if weighed:
            self.mass, self.power = zeros(device=device), zeros(device=device)

    def _count(self, gate: Tensor) -> Tensor:
        """What each token counts ``[tokens]``."""
        counted = gate**self.exponent
        assert self.mass is not None
        assert self.power is not None
        self.home.add(self.mass, counted.sum())
        self.home.add(self.power, gate.square().sum())
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

    def output_drift(self, weight: Tensor, pieces: Pieces = WHOLE) -> Tensor:
        """``W (C - G)`` ``[out, in]`` for C = SᵀX: what the source's outputs have in common with these inputs, less
        what W makes of them. ``weight``: the W of ``through`` where that was given; of its rows those that ``pieces``
        took."""
        assert self.drift is not None
        return pieces.take(self.drift) if self.through is not None else pieces.product(weight, self.drift)


def gap_of(source: Tensor, inputs: Tensor, divisor: Tensor | None) -> Tensor:
    """What the source's inputs, divided, have more."""
    return source - inputs if divisor is None else (source / divisor - inputs).to(inputs.dtype)


def magnitudes(x: Tensor) -> Tensor:
    """The largest of each column, of none 0: float32 ``[in]``."""
    if not len(x):
        return torch.zeros(x.shape[1], device=x.device)
    low, high = x.aminmax(dim=0)
    return torch.maximum(high, -low).float()


def add_gram(home: Home, total: Tensor, x: Tensor) -> None:
    """total += xᵀx, on and above the diagonal's blocks, with a block beside it at a time."""
    for start, stop in blocks_of(x.shape[1], x.device):
        home.add(total[start:stop, start:], product(x[:, start:stop], x[:, start:]))


def product(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right, summed in float32 whatever the inputs' dtype (float32 on the CPU)."""
    if not len(left):
        return torch.zeros(left.shape[1], right.shape[1], device=left.device)
    if left.dtype != torch.float32:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.t() @ right


def fill_below(gram: Tensor) -> None:
    """Of a Gram matrix, or of a stack of them: what lies below the diagonal's blocks is what lies above, transposed."""
    for start, stop in blocks_of(gram.shape[-1], gram.device):
        gram[..., stop:, start:stop] = gram[..., start:stop, stop:].mT


def blocks_of(columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """(first column, end) of the blocks in which a Gram matrix is summed."""
    step = GRAM_BLOCK[device.type]
    for start in range(0, columns, step):
        yield start, min(start + step, columns)
