"""Several processes, a card each, that walk a model together: what they tell one another, and nothing else.

All ranks call the same operations in the same order, so none waits for another that does not come. Numbers travel as
they are: whatever is summed is summed on one rank, in the order of the ranks, so that the bytes do not depend on how
many there are. A fault of the input is raised on all ranks alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qtool import QtoolError

Item = TypeVar("Item")
CPU = torch.device("cpu")
AT_ONCE = 1 << 26  # numbers that a rank receives at once, of all ranks together: 256 MiB
LOST = 70  # exit code of a rank that others left: theirs say why
PATIENCE = timedelta(days=7)  # a rank that died is noticed by whoever started it; one that rounds may take its time


class Elsewhere(QtoolError):
    """A fault that rank 0 tells."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Once is enough."""


class Lost(Elsewhere):
    """Another rank is gone, which says why, or whoever watches the ranks does."""

    def __init__(self, message: str) -> None:
        super().__init__(message, LOST)


@dataclass(frozen=True)
class Ranks:
    """This process among those that walk together. ``device``: where its tensors are."""

    rank: int = 0
    number: int = 1
    device: torch.device = CPU

    def dealt(self, items: Sequence[Item]) -> list[Item]:
        """Of consecutive items those of this rank: item k lies on rank k mod number."""
        return list(items[self.rank :: self.number])

    def rounds(self, items: int) -> int:
        """The most that one rank is dealt."""
        return -(-items // self.number)

    def count(self, numbers: Sequence[int]) -> list[int]:
        """Sums over all ranks, known to all."""
        if self.number == 1:
            return list(numbers)
        sums = torch.tensor(numbers)
        with heard():
            dist.all_reduce(sums)
        return [int(total) for total in sums.tolist()]

    def largest(self, values: Tensor) -> Tensor:
        """The largest over all ranks, known to all; NaN where any is."""
        return values if self.number == 1 else torch.stack(self.gathered(values)).amax(0)

    def gathered(self, part: Tensor) -> list[Tensor]:
        """Every rank's part, all of one shape and type, in their order, known to all."""
        if self.number == 1:
            return [part]
        flat = part.reshape(-1).contiguous()
        found = [torch.empty_like(flat) for _ in range(self.number)]
        with heard():
            dist.all_gather(found, flat)
        return [one.view_as(part) for one in found]

    def tell(self, value: Any) -> list[Any]:
        """What every rank says, as JSON holds it, in their order."""
        if self.number == 1:
            return [value]
        said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.number)]
        with heard():
            dist.all_gather(sizes, torch.tensor([len(said)]))
            most = max(int(size) for size in sizes)
            found = [torch.empty(most, dtype=torch.uint8) for _ in range(self.number)]
            dist.all_gather(found, torch.cat([said, said.new_zeros(most - len(said))]))
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(found, sizes, strict=True)]

    def own(self, work: Iterable[tuple[int | Collection[int], Callable[[], None]]]) -> None:
        """Do what this rank owns of (owner or owners, work), in order. The QtoolError of the first that fails, on
        whichever rank, is raised on all: the same as on one rank alone."""
        fault: tuple[int, str, int] | None = None
        for place, (owner, do) in enumerate(work):
            if self.rank not in ((owner,) if isinstance(owner, int) else owner):
                continue
            try:
                do()
            except QtoolError as error:
                if self.number == 1:
                    raise
                fault = place, error.message, error.exit_code
                break
        found = [said for said in self.tell(fault) if said is not None] if self.number > 1 else []
        if found:
            _, message, code = min(found)
            raise self.fault(message, code)

    def fault(self, message: str, exit_code: int) -> QtoolError:
        """To be raised by all ranks."""
        return (Elsewhere if self.rank else QtoolError)(message, exit_code)


ALONE = Ranks()


@dataclass(frozen=True)
class Home:
    """The rank where something is summed or made; the others send it what they have, or are told."""

    ranks: Ranks = ALONE
    owner: int = 0

    @property
    def mine(self) -> bool:
        """Whether this process is that rank."""
        return self.ranks.rank == self.owner

    def zeros(self, *shape: int, device: torch.device) -> Tensor:
        """What sums begin with; elsewhere a tensor without memory."""
        return torch.zeros(shape, device=device if self.mine else "meta")

    def add(self, total: Tensor, part: Tensor) -> None:
        """``total += part`` at home, of every rank's part, in their order."""
        if self.ranks.number == 1:
            total += part
            return
        for place, piece in zip(self._pieces(total), self._pieces(part), strict=True):
            for one in self.parts(piece):
                place += one

    def parts(self, part: Tensor) -> list[Tensor]:
        """At home every rank's part, all of one shape, in their order; elsewhere nothing."""
        if self.ranks.number == 1:
            return [part]
        flat = part.reshape(-1).contiguous()
        found = [torch.empty_like(flat) for _ in range(self.ranks.number)] if self.mine else None
        with heard():
            dist.gather(flat, found, dst=self.owner)
        return [one.view_as(part) for one in found or []]

    def rows(self, part: Tensor) -> list[Tensor]:
        """As `parts`, but each may have its own number of rows."""
        if self.ranks.number == 1:
            return [part]
        rows = [int(said) for said in self.ranks.tell(len(part))]
        whole = torch.cat([part, part.new_zeros(max(rows) - len(part), *part.shape[1:])])
        return [found[:number] for found, number in zip(self.parts(whole), rows, strict=False)]

    def share(self, tensors: Mapping[str, Tensor], wanted: bool = True) -> dict[str, Tensor]:
        """The home's tensors, on every rank that ``wanted`` them; what others give is not looked at."""
        if self.ranks.number == 1:
            return dict(tensors)
        mine = [
            [name, str(t.dtype).removeprefix("torch."), list(t.shape), t.device.type] for name, t in tensors.items()
        ]
        found = {}
        for name, dtype, shape, kind in self.ranks.tell(mine if self.mine else None)[self.owner]:
            device = self.ranks.device if kind != "cpu" else CPU
            if self.mine:
                tensor = tensors[name].contiguous()
            elif wanted:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            else:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for piece in tensor.view(-1).split(AT_ONCE):
                with heard():
                    dist.broadcast(torch.empty_like(piece, device=device) if piece.is_meta else piece, self.owner)
            if self.mine or wanted:
                found[name] = tensors[name] if self.mine else tensor
        return found

    def _pieces(self, tensor: Tensor) -> Sequence[Tensor]:
        """Of no more numbers than are received at once."""
        if tensor.ndim < 2 or not tensor.numel():
            return [tensor]
        pieces: tuple[Tensor, ...] = tensor.split(max(1, AT_ONCE // self.ranks.number * len(tensor) // tensor.numel()))
        return pieces


HERE = Home()


def dealt_out(costs: Sequence[float], number: int) -> list[int]:
    """The rank of each piece of work: the most costly first, each to the rank that has least; equal ones in order."""
    load, ranks = [0.0] * number, [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        ranks[place] = load.index(min(load))
        load[ranks[place]] += costs[place]
    return ranks


@contextmanager
def joined(rank: int, number: int, device: torch.device) -> Iterator[Ranks]:
    """Find the other ranks, where MASTER_ADDR and MASTER_PORT in the environment say; leave them at the block's end."""
    if number == 1:
        yield Ranks(device=device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels start where this says
    kinds = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    with heard():
        dist.init_process_group(kinds, rank=rank, world_size=number, timeout=PATIENCE)
    yield Ranks(rank, number, device)
    with heard():
        dist.destroy_process_group()  # not after a fault: others may wait in an operation that never ends


@contextmanager
def heard() -> Iterator[None]:
    """Raises Lost where another rank has hung up."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        said = str(error)
        if isinstance(error, dist.DistError) or any(word in said for word in ("gloo", "onnection", "TCPStore", "NCCL")):
            raise Lost(f"lost touch with the other ranks: {' '.join(said.split())[:400]}") from error
        raise
