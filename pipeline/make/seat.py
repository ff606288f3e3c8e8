"""A process's seat among several that make artifacts together, as torchrun or `qtool run --gpus` gives it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qtool import QtoolError
from qtool.make.device import choose_device
from qtool.make.group import GROUP, seated
from qtool.make.job import device_kind
from qtool.quantize.ranks import Ranks, joined


@dataclass(frozen=True)
class Seat:
    """Rank ``rank`` of ``number``, all on this machine."""

    rank: int = 0
    number: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Seat:
        """As the environment says. Raises QtoolError for ranks on several machines."""
        number = int(environment["WORLD_SIZE"]) if seated(environment) else 1
        if number == 1:
            return ONE
        if int(environment.get("LOCAL_WORLD_SIZE", number)) != number:
            raise QtoolError("torchrun: all ranks must be on one machine (--nnodes 1).")
        return cls(int(environment["RANK"]), number)

    @contextmanager
    def taken(self, device: str) -> Iterator[tuple[Ranks, str]]:
        """(who works together, this rank's device), until all leave. ``device``: as a user names it; rank r takes
        cuda:r. Raises QtoolError where there are fewer, or where they are not of one kind."""
        own = self.device(device)
        with joined(self.rank, self.number, choose_device(own)) as ranks:
            for name in GROUP if self.number > 1 else ():
                os.environ.pop(name, None)
            kinds = ranks.tell(device_kind(choose_device(own))) if self.number > 1 else []
            if len(set(kinds)) > 1:
                raise ranks.fault(f"the ranks' devices are of several kinds, which round differently: {kinds}.", 3)
            yield ranks, own

    def _fault(self, message: str, exit_code: int = 2) -> QtoolError:
        """What every rank finds by itself."""
        return Ranks(self.rank, self.number).fault(message, exit_code)

    def device(self, asked: str) -> str:
        """This rank's. Raises QtoolError as `taken`."""
        if self.number == 1:
            return asked
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if asked == "auto":
            asked = "cuda" if there else "cpu"
        if asked == "cuda" and there < self.number:
            seen = f"{there} accelerator{'s' if there > 1 else ''}" if there else "no accelerator"
            raise self._fault(f"{self.number} ranks take a card each, and torch sees {seen} here.", 3)
        if asked not in ("cpu", "cuda"):
            raise self._fault(f"--device {asked}: {self.number} ranks take cuda:0 to cuda:{self.number - 1} (`cuda`).")
        return "cpu" if asked == "cpu" else f"cuda:{self.rank}"


ONE = Seat()
