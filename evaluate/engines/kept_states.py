"""Hidden states between two layers of a sweep, on the disk: a text that took an hour is not begun again.

Every rank writes its own positions, and which they are. So whatever number of ranks goes on finds its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from qtool.convert.files.durable import write_whole
from qtool.evaluate.engines.share import Share

_NAME = re.compile(r"(\d{5})-(\d+)-of-(\d+)\.safetensors")  # layers done, rank, number


@dataclass(frozen=True)
class KeptStates:
    """In ``folder``, which all ranks see."""

    folder: Path
    share: Share

    def found(self, own: Tensor, length: int, device: torch.device) -> tuple[int, Tensor | None]:
        """(layers done, hidden states ``[own positions, hidden]`` behind them) of an earlier run, the same layers on
        all ranks; (0, None) where there are none. Damaged ones are passed over."""
        for done, number in self.share.tell(self._whole())[0]:
            states = self._read(done, number, own, length, device)
            if all(self.share.tell(states is not None)):
                return done, states
        return 0, None

    def save(self, done: int, states: Tensor, own: Tensor) -> None:
        """What each rank has behind ``done`` layers; earlier ones go when all have written theirs."""
        path = self._path(done, self.share.rank, self.share.number)
        write_whole(path, save({"states": states.cpu(), "positions": own.to(torch.int32)}))
        self.share.tell(None)
        for other in self.folder.glob("*.safetensors") if self.share.rank == 0 else []:
            found = _NAME.fullmatch(other.name)
            if found is None or (int(found[1]), int(found[3])) != (done, self.share.number):
                other.unlink()

    def _path(self, done: int, rank: int, number: int) -> Path:
        return self.folder / f"{done:05}-{rank}-of-{number}.safetensors"

    def _whole(self) -> list[tuple[int, int]]:
        """(layers done, number of ranks) of those that every rank has written, the most layers first."""
        names = [found for path in self.folder.glob("*.safetensors") if (found := _NAME.fullmatch(path.name))]
        sets = {(int(name[1]), int(name[3])) for name in names}
        return sorted(
            (one for one in sets if all(self._path(one[0], rank, one[1]).is_file() for rank in range(one[1]))),
            reverse=True,
        )

    def _read(self, done: int, number: int, own: Tensor, length: int, device: torch.device) -> Tensor | None:
        """None where a file is damaged, or holds positions of another text."""
        row = torch.full((length,), -1)
        row[own] = torch.arange(len(own))
        states: Tensor | None = None
        given = 0
        try:
            for rank in range(number):
                with safe_open(self._path(done, rank, number), framework="pt") as file:
                    positions, part = file.get_tensor("positions").long(), file.get_tensor("states")
                rows = row[positions]
                if states is None:
                    states = part.new_empty(len(own), part.shape[1], device=device)
                states[rows[rows >= 0].to(device)] = part[rows >= 0].to(device)
                given += int((rows >= 0).sum())
        except (SafetensorError, OSError, ValueError, IndexError):
            return None
        return states if given == len(own) else None
