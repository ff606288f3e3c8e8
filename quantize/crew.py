"""The ranks that round one output together: each a part of a matrix's rows, or some of the candidates of a search.

A row's codes depend on the Gram matrix and on no other row, so rows may be rounded anywhere; but a product's last
digits depend on how many rows it has. So a large matrix is always worked on in the same pieces, a product for each,
whether one rank has them all or each of several has some: the bytes do not depend on who helps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qtool.quantize.ranks import ALONE, PATIENCE, Ranks, heard

Item = TypeVar("Item")
PIECES = 4  # of a large matrix's rows
LEAST = 1 << 36  # rows x columns²: below, what is sent takes as long as what is saved (docs/cards.md)
ALIGNED = 32  # rows of a piece divide by it, so that the kernels' programs are of one piece each


@dataclass(frozen=True)
class Crew:
    """``members``: ranks, the output's owner first; ``group``: through which they exchange, where they are several."""

    ranks: Ranks = ALONE
    members: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, ranks: Ranks, members: Sequence[int]) -> Crew:
        """Called by all ranks, in the same order."""
        several = len(members) > 1
        with heard():
            group = dist.new_group(list(members), timeout=PATIENCE) if several else None
        return cls(ranks, tuple(members), group)

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.members)

    @property
    def here(self) -> bool:
        """Whether this process is one of them."""
        return self.ranks.rank in self.members

    @property
    def place(self) -> int:
        """Of this process among them."""
        return self.members.index(self.ranks.rank)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This member's part of ``items``: as many for each but for the last ones."""
        each = -(-len(items) // self.size)
        return items[self.place * each : (self.place + 1) * each]

    def whole(self, part: Tensor, number: int) -> Tensor:
        """``number`` rows ``[number, ...]`` of which this member has its `share`: all of them, known to all members."""
        if self.size == 1:
            return part
        each = -(-number // self.size)
        sent = part.contiguous()
        if len(part) < each:
            sent = torch.cat([part, part.new_zeros(each - len(part), *part.shape[1:])])
        found = part.new_empty(self.size * each, *part.shape[1:])
        with heard():
            dist.all_gather_into_tensor(found, sent, group=self.group)
        return found[:number]

    def figures(self, work: Sequence[Callable[[], Tensor]], like: Tensor) -> list[Tensor]:
        """What each of ``work`` computes, a float32 tensor of the shape of ``like``, known to all members: each does a
        share."""
        mine = [do().float() for do in self.share(work)]
        part = torch.stack(mine) if mine else like.new_empty(0, *like.shape, dtype=torch.float32)
        return list(self.whole(part, len(work)))


SOLO = Crew()


@dataclass(frozen=True)
class Pieces:
    """The pieces of a matrix ``[out, in]``, or of several below each other: its rows as ``[pieces, rows, in]``, of
    which this member of the crew has its share. Small matrices, and experts, are one piece, as they are."""

    crew: Crew
    number: int

    @classmethod
    def of(cls, crew: Crew, weight: Tensor, divided: bool = True) -> Pieces:
        """``divided`` False: whatever is done with it is not done row by row."""
        if weight.ndim == 3 or not divided:
            return cls(crew, 1)
        out, columns = weight.shape
        return cls(crew, PIECES if out * columns**2 >= LEAST and not out % (PIECES * ALIGNED) else 1)

    def take(self, matrix: Tensor) -> Tensor:
        """Views of this member's pieces of ``[out, ...]``."""
        if self.number == 1:
            return matrix
        mine = self.crew.share(range(self.number))
        pieces: Tensor = matrix.unflatten(0, (self.number, -1))
        return pieces[mine[0] : mine[-1] + 1]

    def product(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """``rows @ matrix`` of pieces that were taken, a product for each."""
        return rows @ matrix if self.number == 1 else torch.stack([one @ matrix for one in rows])

    def whole(self, part: Tensor) -> Tensor:
        """Of what this member made of its pieces ``[pieces, rows, ...]`` that of all rows ``[out, ...]``."""
        return part if self.number == 1 else self.crew.whole(part, self.number).flatten(0, 1)

    def below(self, part: Tensor) -> Tensor:
        """As `whole`, of pieces whose rows lie below each other ``[pieces * rows, ...]``."""
        if self.number == 1:
            return part
        pieces: Tensor = part.unflatten(0, (len(self.crew.share(range(self.number))), -1))
        return self.whole(pieces)


WHOLE = Pieces(SOLO, 1)


def crews_of(costs: Sequence[float], owners: Sequence[int], number: int) -> list[tuple[int, ...]]:
    """The members of each output's crew, of ``number`` ranks: its owner, and those that own nothing that costs (0). A
    crew has 1, 2 or 4 members, so that all have as many pieces; the output whose members have most to do is helped
    first, of equal ones the first."""
    crews = [[owner] for owner in owners]
    busy = [owner for cost, owner in zip(costs, owners, strict=True) if cost]
    free = [rank for rank in range(number) if rank not in busy]
    alone = [busy.count(owner) == 1 for owner in owners]
    while True:
        able = [
            place for place, crew in enumerate(crews)
            if costs[place] and alone[place] and len(crew) <= min(len(free), PIECES // 2)
        ]  # fmt: skip
        if not able:
            return [tuple(crew) for crew in crews]
        place = max(able, key=lambda place: costs[place] / len(crews[place]))
        more = len(crews[place])
        crews[place] += free[:more]
        del free[:more]
