"""Statistics of a mixture's experts: each from the tokens that its router sends to it, rare ones blended.

An expert's output enters the layer's as p · down(a), p its router's weight, so an error of down costs Σ p² |ΔW a|² over
its tokens, and one of gate and up the same to first order. A token counts p**exponent in the expert's Gram matrix; with
0 all count alike, and more of them tell. An expert that few tokens reached has a Gram matrix of low rank, on which
compensation would fit noise: part of it is replaced by what the expert would see if every token were sent to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from qtool.convert.models.geometry import Geometry
from qtool.quantize.crew import WHOLE, Pieces
from qtool.quantize.experts import products
from qtool.quantize.precision import bfloat16_products
from qtool.quantize.ranks import HERE, Home
from qtool.quantize.scaling import AT_ONCE
from qtool.quantize.statistics import add_gram, fill_below, gap_of, magnitudes, product

MOST_TEXT = 8  # times the windows that a recipe asks for, at most, for the sake of experts
SAMPLE = 8192  # tokens at most that rare experts are shown, wherever the router sends them


class ExpertSettings(BaseModel):
    """How the experts of a mixture are calibrated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exponent: Annotated[int, Field(ge=0, le=2)] = 0  # docs/benchmarks.md: no worse than 1 or 2
    """A token counts its router's weight to this power."""
    blend: Annotated[float, Field(ge=0, le=64, allow_inf_nan=False)] = 1.0
    """An expert with n tokens takes the share 1 - n / (blend · input width) of its statistics from tokens of all
    experts, none from that many tokens on; 0: only an expert that no token reached does."""
    min_tokens: Annotated[int, Field(ge=0, le=10**7)] = 0
    """So many tokens the mean expert shall see: more windows than `calibration.samples` are drawn until then, at most
    eight times as many."""

    def samples(self, shape: Geometry, samples: int, length: int) -> int:
        """How many windows of ``length`` tokens are drawn where a recipe asks for ``samples``."""
        if not shape.experts:
            return samples
        wanted = math.ceil(self.min_tokens * shape.experts / (shape.active * length))
        return min(max(samples, wanted), MOST_TEXT * samples)

    def share(self, tokens: int, columns: int) -> float:
        """Of the blended statistics that come from all tokens."""
        if not tokens:
            return 1.0
        return max(0.0, 1.0 - tokens / (self.blend * columns)) if self.blend else 0.0


@dataclass
class RoutedStatistics:
    """Of one input of E experts: as InputStatistics, with a leading axis of experts on every tensor.

    counts: tokens of each; mass: the sum of their p**exponent, float32 ``[E]``; power: of p² of all; shares: what part
    came from all tokens, known once finished; agreed: of the tokens that the source sends to each expert, how many this
    stream sends there too, and of how many (its own stream alone); ``absmax`` is one row for all experts. Every rank
    knows the counts of all; the sums are at ``home`` alone.
    """

    experts: int
    settings: ExpertSettings
    channels_only: bool = False
    through: Tensor | None = None
    drifting: bool = False
    counts: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    mass: Tensor = field(default_factory=lambda: torch.empty(0))
    power: Tensor = field(default_factory=lambda: torch.empty(0))
    gram: Tensor = field(default_factory=lambda: torch.empty(0))
    drift: Tensor | None = None
    abs_sum: Tensor = field(default_factory=lambda: torch.empty(0))
    absmax: Tensor = field(default_factory=lambda: torch.empty(0))
    square_sum: Tensor = field(default_factory=lambda: torch.empty(0))
    agreed: tuple[Tensor, Tensor] | None = None
    home: Home = HERE

    def _open(self, x: Tensor) -> None:
        number, columns, device, zeros = self.experts, x.shape[1], x.device, self.home.zeros
        self.counts, self.mass = [0] * number, zeros(number, device=device)
        self.power = zeros(device=device)
        self.square_sum = zeros(number, columns, device=device)
        self.absmax = zeros(columns, device=device)
        if self.channels_only:
            return
        self.gram = zeros(number, columns, columns, device=device)
        self.abs_sum = zeros(number, columns, device=device)
        if self.drifting:
            rows = columns if self.through is None else self.through.shape[1]
            self.drift = zeros(number, rows, columns, device=device)

    def add(
        self,
        x: Tensor,
        weights: Tensor,
        counts: Sequence[int],
        source: Tensor | None = None,
        divisor: Tensor | None = None,
        behind: Tensor | None = None,
    ) -> None:
        """Count the slots of a batch, ordered by expert: ``x [slots, in]``, ``weights [slots]`` of the router,
        ``counts`` of each expert. ``source``, ``divisor`` (also ``[E, in]``), ``behind [slots, out]``: as
        `InputStatistics.add`, for streams that drift."""
        if not self.counts:
            self._open(x)
        everywhere = self.home.ranks.count(counts)
        self.counts = [before + more for before, more in zip(self.counts, everywhere, strict=True)]
        for largest in self.home.parts(magnitudes(x)):
            self.absmax = torch.maximum(self.absmax, largest)
        first = 0
        for start in range(0, self.experts, AT_ONCE):  # so many experts' slots at a time
            some, own = slice(start, start + AT_ONCE), list(counts[start : start + AT_ONCE])
            slots = slice(first, first + sum(own))
            first = slots.stop
            reached = [count > 0 for count in everywhere[some]]
            if any(reached):
                given = [None if part is None else part[slots] for part in (source, behind)]
                self._add(some, own, reached, x[slots], weights[slots], given[0], divisor, given[1])

    def agree(self, both: Tensor, sent: Tensor) -> None:
        """Count what `Routed.agreement` says of a batch."""
        if self.agreed is None:
            begun = [self.home.zeros(self.experts, device=part.device) for part in (both, sent)]
            self.agreed = begun[0], begun[1]
        for total, part in zip(self.agreed, (both, sent), strict=True):
            self.home.add(total, part)

    def _add(
        self,
        some: slice,
        counts: list[int],
        reached: Sequence[bool],
        x: Tensor,
        weights: Tensor,
        source: Tensor | None,
        divisor: Tensor | None,
        behind: Tensor | None,
    ) -> None:
        """Of some experts. ``reached``: whether any rank's tokens did reach each."""
        add = self.home.add
        if not self.drifting:
            self._add_channels(some, counts, x, weights)
        if self.channels_only:
            return
        counted = weights.float() ** self.settings.exponent
        add(self.mass[some], torch.stack([part.sum() for part in counted.split(counts)]))
        add(self.power, weights.float().square().sum())
        root = counted.sqrt().to(x.dtype).unsqueeze(1)
        with bfloat16_products() if x.dtype == torch.bfloat16 else nullcontext():
            weighed = x * root if x.is_cuda else (x * root).float()
            for gram, part, told in zip(self.gram[some], weighed.split(counts), reached, strict=True):
                if told:
                    add_gram(self.home, gram, part)
            if self.drift is None or source is None:
                return
            if divisor is not None and divisor.ndim == 2:
                each = torch.tensor(counts, device=x.device)
                divisor = divisor[some].repeat_interleave(each, 0, output_size=len(x))
            gap = gap_of(source, x, divisor)
            if self.through is not None:
                gap = products(self.through[some].to(gap.dtype), gap, counts)
            gap = gap if behind is None else gap + behind
            gap = gap * root if x.is_cuda else (gap * root).float()
            parts = zip(self.drift[some], gap.split(counts), weighed.split(counts), reached, strict=True)
            for drift, lost, part, told in parts:
                if told:
                    add(drift, product(lost, part))

    def _add_channels(self, some: slice, counts: list[int], x: Tensor, weights: Tensor) -> None:
        """What only the source's stream is asked for."""
        ones = torch.ones(len(x), device=x.device).split(counts)
        wide = x.float()
        squares = [one @ part for one, part in zip(ones, wide.square().split(counts), strict=True)]  # faster than norms
        self.home.add(self.square_sum[some], torch.stack(squares))
        if not self.channels_only:
            counted = (weights.float() ** self.settings.exponent).split(counts)
            sums = [weight @ part for weight, part in zip(counted, wide.abs().split(counts), strict=True)]
            self.home.add(self.abs_sum[some], torch.stack(sums))

    def finish(self, typical: Callable[[int], Tensor]) -> None:
        """Make the Gram matrices whole, and blend those of rare experts. ``typical``: the inputs ``[tokens, in]`` that
        an expert would have if a sample of all tokens were sent to it."""
        columns = self.absmax.shape[0]
        self.shares = [self.settings.share(tokens, columns) for tokens in self.counts]
        if not self.home.mine:
            return
        one = self.mass.sum() / max(1, sum(self.counts))  # what a token counts, in the mean
        if not self.channels_only:
            fill_below(self.gram)
        for expert, share in enumerate(self.shares):
            if not share or (self.channels_only and self.counts[expert]):
                continue
            inputs = typical(expert)
            wide = inputs.float()
            if not self.counts[expert]:
                self.square_sum[expert] = wide.square().mean(0)
            if self.channels_only:
                continue
            mass = torch.maximum(self.mass[expert], one)
            seen = inputs if inputs.is_cuda else wide
            moment = product(seen, seen)
            self.gram[expert].mul_(1 - share).add_(moment * mass, alpha=share / len(inputs))
            self.abs_sum[expert].mul_(1 - share).add_(wide.abs().mean(0) * mass, alpha=share)
            self.mass[expert] = self.mass[expert] * (1 - share) + mass * share
            if self.drift is not None:
                self.drift[expert].mul_(1 - share)

    @property
    def tokens(self) -> int:
        """Slots of all experts."""
        return sum(self.counts)

    @property
    def mean_abs(self) -> Tensor:
        """mean|x| of each expert ``[E, in]``."""
        return self.abs_sum / self.mass.unsqueeze(1).clamp_min(1e-30)

    @property
    def first_unsound(self) -> int:
        """As `InputStatistics.first_unsound`."""
        return int((~self.mean_square.isfinite().all(1)).int().argmax())

    @property
    def counted(self) -> float:
        """As `InputStatistics.counted`: errors enter the layer's sum with p², whatever power the tokens have here."""
        return float(self.power / self.mass.sum().clamp_min(1e-30))

    @property
    def overall_abs(self) -> Tensor:
        """mean|x| over the slots of all experts ``[in]``."""
        return self.abs_sum.sum(0) / self.mass.sum().clamp_min(1e-30)

    @property
    def mean_square(self) -> Tensor:
        """mean x² of each expert ``[E, in]``, every token counted alike; of a stream that drifts as its Gram matrix
        counts them, with what was blended."""
        if self.drifting:
            return self.gram.diagonal(dim1=-2, dim2=-1) / self.mass.unsqueeze(1).clamp_min(1e-30)
        counts = torch.tensor(self.counts, device=self.square_sum.device).clamp_min(1)
        return self.square_sum / counts.unsqueeze(1)

    def part(self, some: slice) -> RoutedStatistics:
        """Some experts' statistics, as views."""
        agreed = None if self.agreed is None else (self.agreed[0][some], self.agreed[1][some])
        return RoutedStatistics(
            len(self.counts[some]), self.settings, False, None if self.through is None else self.through[some],
            self.drifting, self.counts[some], self.shares[some], self.mass[some], self.power, self.gram[some],
            None if self.drift is None else self.drift[some], self.abs_sum[some], self.absmax, self.square_sum[some],
            agreed, self.home,
        )  # fmt: skip

    def output_drift(self, weight: Tensor, pieces: Pieces = WHOLE) -> Tensor:
        """As `InputStatistics.output_drift`, ``[E, out, in]``; experts are not in pieces."""
        assert self.drift is not None
        return self.drift if self.through is not None else weight @ self.drift

    def figures(self) -> list[dict[str, float]]:
        """For the record of each expert: its tokens, what part of its statistics came from all tokens, and of the
        source's tokens of this expert what part came here too."""
        found = [
            {"tokens": float(tokens), "blended": float(f"{share:.6g}")}
            for tokens, share in zip(self.counts, self.shares, strict=True)
        ]
        if self.agreed is not None:
            both, sent = (part.tolist() for part in self.agreed)
            for figures, kept, whole in zip(found, both, sent, strict=True):
                if whole:
                    figures["routing"] = float(f"{kept / whole:.6g}")
        return found
