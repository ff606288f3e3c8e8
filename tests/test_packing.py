"""Bit layouts as literal words, and through an independent reading of AutoAWQ's own order."""

from __future__ import annotations

import pytest
import torch

from qtool.convert.formats import autoawq
from qtool.convert.formats.codes import UniformCodes
from qtool.convert.formats.packing import AWQ_ORDER, pack, pack_rows, unpack, unpack_rows


def words(tensor: torch.Tensor) -> list[int]:
    return [value & 0xFFFFFFFF for value in tensor.flatten().tolist()]


def test_awq_order_as_literal_words() -> None:
    column = torch.arange(8, dtype=torch.uint8).unsqueeze(1)
    # nibble i holds row [0, 2, 4, 6, 1, 3, 5, 7][i]; nibble 0 is the lowest
    assert words(pack_rows(column, AWQ_ORDER)) == [0x75316420]


def test_sequential_order_as_literal_words() -> None:
    row = torch.arange(8, dtype=torch.uint8).unsqueeze(0)
    assert words(pack(row, 4)) == [0x76543210]
    assert words(pack(row + 0xF0, 8)) == [0xF3F2F1F0, 0xF7F6F5F4]


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_value_by_value(bits: int) -> None:
    """A plain loop over words says the same, of rows that are a slice and of rows that lie apart, too."""
    values = torch.randint(0, 2**bits, (9, 64), dtype=torch.uint8)
    for rows in (values, values[3:7], values[::2], values.view(64, 9).t()):
        packed = pack(rows, bits)
        expected = [
            sum(int(value) << bits * i for i, value in enumerate(row[at : at + 32 // bits]))
            for row in rows.tolist()
            for at in range(0, 64, 32 // bits)
        ]
        assert words(packed) == expected
        assert torch.equal(unpack(packed, bits), rows)
        assert torch.equal(unpack(packed.t().contiguous().t(), bits), rows)


def test_unpacked_by_shifts_in_autoawqs_reverse_order() -> None:
    """AutoAWQ shifts out nibbles 0..7 and then takes them in the order [0, 4, 1, 5, 2, 6, 3, 7]."""
    values = torch.randint(0, 16, (24, 5), dtype=torch.uint8)
    packed = pack_rows(values, AWQ_ORDER)
    assert packed.shape == (5, 3)
    shifted = (packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    assert torch.equal(shifted[..., [0, 4, 1, 5, 2, 6, 3, 7]].reshape(5, 24).t().to(torch.uint8), values)
    assert torch.equal(unpack_rows(packed, AWQ_ORDER), values)


def test_one_group_of_zero_points_is_a_row_of_one_stride() -> None:
    """A matrix as wide as its group: `t().contiguous()` of one row keeps the stride that it had."""
    values = torch.arange(16, dtype=torch.uint8).view(16, 1)
    packed = pack_rows(values, AWQ_ORDER)
    assert packed.shape == (1, 2)
    read = torch.tensor(packed.tolist(), dtype=torch.int32)  # as a file has it: strides (2, 1), not (1, 1)
    assert torch.equal(unpack_rows(read, AWQ_ORDER), values)


def test_what_does_not_fill_words_is_refused() -> None:
    for bits, columns in ((4, 12), (8, 6)):
        with pytest.raises(ValueError, match=f"{columns} columns"):
            pack(torch.zeros(8, columns, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="12 rows"):
        pack_rows(torch.zeros(12, 8, dtype=torch.uint8), AWQ_ORDER)


def test_gemm_container_shapes_and_values() -> None:
    codes = UniformCodes(
        codes=torch.randint(0, 16, (16, 64), dtype=torch.uint8),
        scale=torch.rand(16, 2).half() + 0.01,
        zero=torch.randint(0, 16, (16, 2), dtype=torch.uint8),
        bits=4,
        group_size=32,
    )
    section = autoawq.quantization_config(32, [])
    packed = autoawq.pack(codes, section)
    planned = autoawq.specs(16, 64, section, torch.float16)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.items()} == planned
    assert autoawq.unpack(packed, section).equals(codes)
    weight = codes.dequantize()
    row, column = 3, 40
    expected = (int(codes.codes[row, column]) - int(codes.zero[row, 1])) * float(codes.scale[row, 1])
    assert float(weight[row, column]) == expected


def test_quantization_config_has_the_public_keys() -> None:
    assert autoawq.quantization_config(64, []) == {
        "quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip
