"""What a quantization algorithm returns: integer codes and the numbers that turn them back into weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class UniformCodes:
    """A linear on a uniform grid: ``w[o, i] = (codes[o, i] - zero[o, g(i)]) * scale[o, g(i)]``, g(i) = i // group_size.

    codes uint8 ``[out, in]`` in 0 .. 2**bits - 1; scale (as stored: float16 or bfloat16) and zero uint8 ``[out, groups]``.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group_size: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Weight ``[out, in]``: computed in float32, then rounded once to ``dtype``."""
        out, columns = self.codes.shape
        grouped = self.codes.view(out, -1, self.group_size).float()
        weight = (grouped - self.zero.float().unsqueeze(-1)).mul_(self.scale.float().unsqueeze(-1))
        return weight.view(out, columns).to(dtype)

    def cpu(self) -> UniformCodes:
        """The same codes in host memory."""
        return UniformCodes(self.codes.cpu(), self.scale.cpu(), self.zero.cpu(), self.bits, self.group_size)

    def equals(self, other: UniformCodes) -> bool:
        """Bit for bit: codes, scales, zeros and geometry."""
        return (
            (self.bits, self.group_size) == (other.bits, other.group_size)
            and torch.equal(self.codes, other.codes)
            and self.scale.dtype == other.scale.dtype
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero, other.zero)
        )
