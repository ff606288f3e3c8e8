"""One long text over several ranks: which positions are whose, and the keys and values that they hand one another.

Positions are dealt out in chunks, there and back (0, 1, 2, 2, 1, 0, …), so that each rank has as many early ones, which
see few keys, as late ones. A step is a chunk of each. In it every rank computes keys and values of its own chunk, all
give theirs to all, and each attends to those up to its own last position: the sums that one rank alone would make.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from qtool import QtoolError
from qtool.evaluate.engines.engine import CHUNK
from qtool.evaluate.engines.window_cache import WindowLayer


@dataclass(frozen=True)
class Share:
    """Rank ``rank`` of ``number``. ``gather``: every rank's tensor, all of one shape, in their order; ``tell``: what
    every rank says. All ranks call both alike."""

    rank: int = 0
    number: int = 1
    gather: Callable[[Tensor], list[Tensor]] = lambda part: [part]
    tell: Callable[[Any], list[Any]] = lambda value: [value]

    def chunk(self, length: int, most: int) -> int:
        """Positions of a chunk: ``most``, or fewer so that each rank has one. Raises QtoolError for a text of fewer
        tokens than ranks."""
        if length < self.number:
            raise QtoolError(f"long: a text of {length} tokens cannot be divided among {self.number} ranks.")
        return min(most, length // self.number)

    def steps(self, length: int, chunk: int) -> list[list[range]]:
        """Of each step every rank's positions; an empty range where the text has ended."""
        found = []
        for step, start in enumerate(range(0, length, chunk * self.number)):
            ends = [min(length, start + chunk * place) for place in range(self.number + 1)]
            spans = [range(*ends[place : place + 2]) for place in range(self.number)]
            found.append(spans[::-1] if step % 2 else spans)
        return found

    def own(self, length: int, chunk: int) -> Tensor:
        """This rank's positions int64, in the order in which it computes them."""
        return torch.cat([torch.arange(*_ends(spans[self.rank])) for spans in self.steps(length, chunk)])

    def starts(self, length: int) -> range:
        """Where the chunks of `CHUNK` positions begin whose logits this rank computes."""
        return range(self.rank * CHUNK, length, self.number * CHUNK)

    def for_head(self, states: Tensor, length: int, chunk: int) -> Tensor:
        """Of hidden states ``[own positions, hidden]`` as layers have them, those of `starts`."""
        if self.number == 1:
            return states
        found = states.new_empty(sum(min(CHUNK, length - start) for start in self.starts(length)), states.shape[1])
        given = 0
        for spans in self.steps(length, chunk):
            mine = states[given : given + len(spans[self.rank])]
            given += len(mine)
            for span, part in zip(spans, self.gather(pad(mine, (0, 0, 0, chunk - len(mine)))), strict=True):
                at = torch.arange(*_ends(span), device=states.device)
                here = at // CHUNK % self.number == self.rank
                at = at[here]
                found[at // CHUNK // self.number * CHUNK + at % CHUNK] = part[: len(span)][here]
        return found


ALONE = Share()


def _ends(span: range) -> tuple[int, int]:
    return span.start, span.stop


class SharedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """A layer's keys and values of all ranks, kept by ``inner`` as it would keep those of one."""

    def __init__(self, inner: Any, share: Share, chunk: int) -> None:
        super().__init__()
        self.inner, self.share, self.chunk = inner, share, chunk
        self.spans: list[range] = [range(0)] * share.number
        self.sent: Tensor | None = None

    @property
    def span(self) -> range:
        """This rank's positions in the step at hand."""
        return self.spans[self.share.rank]

    def begin(self, spans: list[range]) -> bool:
        """Take up a step; whether this rank has a part in it. One that has none takes its neighbours' all the same:
        it is the last step, and nobody waits."""
        self.spans = spans
        if not self.span and self.sent is not None:
            self.share.gather(torch.zeros_like(self.sent))
        return bool(self.span)

    def get_seq_length(self) -> int:
        """Where this rank's next positions begin."""
        return self.span.start

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, up to the own last position, dim]``, after everybody's were exchanged."""
        width, found = key_states.shape[-1], None
        both = torch.cat([key_states, value_states], dim=-1)
        self.sent = pad(both, (0, 0, 0, self.chunk - both.shape[-2]))
        given = zip(self.spans, self.share.gather(self.sent), strict=True)
        for span, part in sorted(given, key=lambda pair: pair[0].start):
            if not span:
                continue
            keys, values = part[..., : len(span), :width], part[..., : len(span), width:]
            kept: tuple[Tensor, Tensor] = self.inner.update(keys, values)
            found = kept if span is self.span else found
        assert found is not None  # a rank without a part does not come here
        return found

    def mask(self, new: int, like: Tensor) -> Tensor | None:
        """As of `inner`, for this rank's positions; None where the model makes its own."""
        rolls = isinstance(self.inner, WindowLayer)
        return self.inner.mask(new, like, self.span.start) if rolls else None
