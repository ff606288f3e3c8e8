"""Bit orders of the integer containers: eight 4-bit or four 8-bit values in one int32.

AutoAWQ GEMM (awq/utils/packing_utils.py), eight columns along OUT in one int32:

    bits      31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
    column      8c+7   8c+5   8c+3   8c+1   8c+6   8c+4   8c+2   8c+0

GPTQ (gptqmodel/nn_modules/qlinear) and compressed-tensors (pack_quantized/helpers.py), sequential:

    bits      31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0        31..24 23..16 15..8  7..0
    value       8r+7   8r+6   8r+5   8r+4   8r+3   8r+2   8r+1   8r+0        4r+3   4r+2   4r+1   4r+0
"""

from __future__ import annotations

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i holds logical column AWQ_ORDER[i]
SEQUENTIAL = (0, 1, 2, 3, 4, 5, 6, 7)
WIDTHS = (4, 8)  # bits that can be packed


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``[rows, columns]`` -> int32 ``[rows, columns * bits / 32]``, lowest bits first."""
    if bits == 4:
        return pack_nibbles(values)
    rows, columns = values.shape
    if columns % 4:
        raise ValueError(f"{columns} columns do not pack into 32-bit words of four")
    return values.contiguous().view(-1).view(torch.int32).view(rows, columns // 4)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack`."""
    if bits == 4:
        return unpack_nibbles(words)
    return words.contiguous().view(-1).view(torch.uint8).view(words.shape[0], 4 * words.shape[1])


def pack_nibbles(values: torch.Tensor, order: tuple[int, ...] = SEQUENTIAL) -> torch.Tensor:
    """uint8 ``[rows, columns]`` in 0..15 -> int32 ``[rows, columns / 8]``: nibble i of a word is column
    ``order[i]``."""
    rows, columns = values.shape
    if columns % 8:
        raise ValueError(f"{columns} columns do not pack into 32-bit words of eight")
    nibbles = values.view(rows, columns // 8, 8)[..., list(order)]
    # two nibbles to a byte, four bytes to a little-endian word: never wider than the result
    pairs = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return pairs.contiguous().view(torch.int32).view(rows, columns // 8)


def unpack_nibbles(words: torch.Tensor, order: tuple[int, ...] = SEQUENTIAL) -> torch.Tensor:
    """Inverse of `pack_nibbles`: int32 ``[rows, words]`` -> uint8 ``[rows, 8 * words]``."""
    rows, columns = words.shape
    pairs = words.contiguous().view(torch.uint8).view(rows, columns, 4)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1).view(rows, columns, 8)
    inverse = [order.index(column) for column in range(8)]
    return nibbles[..., inverse].reshape(rows, columns * 8)
