"""Token batches that calibrate every output, and the digest that names them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CalibrationSet:
    """``tokens`` int64 ``[samples, length]``; ``origin`` says where the text came from."""

    tokens: torch.Tensor
    origin: str

    @property
    def digest(self) -> str:
        """sha256 of the exact tokens and their shape."""
        shape = "x".join(map(str, self.tokens.shape)).encode()
        return hashlib.sha256(shape + b"\0" + self.tokens.contiguous().numpy().tobytes()).hexdigest()

    def batches(self, size: int) -> list[torch.Tensor]:
        """Consecutive batches of at most ``size`` samples."""
        return list(self.tokens.split(size))
