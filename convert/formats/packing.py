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
WIDTHS = (4, 8)  # bits that can be packed


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``[rows, columns]`` -> int32 ``[rows, columns * bits / 32]``, lowest bits first."""
    rows, columns = values.shape
    count = 32 // bits
    if columns % count:
        raise ValueError(f"{columns} columns do not pack into 32-bit words of {count}")
    if bits == 4:  # two neighbours as one number of 16 bits: its low byte takes both
        pairs = values.contiguous().view(-1).view(torch.int16)
        values = (pairs | pairs >> 4).to(torch.uint8)
    return values.contiguous().view(-1).view(torch.int32).view(rows, columns // count)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack`."""
    rows, columns = words.shape
    octets = words.contiguous().view(-1).view(torch.uint8)
    if bits == 8:
        return octets.view(rows, 4 * columns)
    values = octets.new_empty((octets.numel(), 2))
    values[:, 0] = octets & 15
    values[:, 1] = octets >> 4
    return values.view(rows, 8 * columns)


def pack_rows(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """uint8 ``[rows, columns]`` in 0..15 -> int32 ``[columns, rows / 8]``: nibble i of a word is row ``order[i]`` of
    its eight. Rows are put together while they lie in a line; what is transposed is an eighth of the numbers."""
    rows, columns = values.shape
    if rows % 8:
        raise ValueError(f"{rows} rows do not pack into 32-bit words of eight")
    eights = values.contiguous().view(rows // 8, 8, columns)
    octets = values.new_empty((rows // 8, columns, 4))  # little-endian words
    for i in range(4):
        octets[..., i] = eights[:, order[2 * i]] | eights[:, order[2 * i + 1]] << 4
    return octets.view(torch.int32).squeeze(-1).t().contiguous()


def unpack_rows(words: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Inverse of `pack_rows`: int32 ``[columns, words]`` -> uint8 ``[8 * words, columns]``."""
    columns, count = words.shape
    octets = words.t().contiguous().view(-1).view(torch.uint8).view(count, columns, 4)  # flat: of one column any stride
    eights = octets.new_empty((count, 8, columns))
    for i in range(4):
        both = octets[..., i].contiguous()
        eights[:, order[2 * i]] = both & 15
        eights[:, order[2 * i + 1]] = both >> 4
    return eights.view(8 * count, columns)
