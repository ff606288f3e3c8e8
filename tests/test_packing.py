"""Bit layouts as literal words, and through an independent reading of AutoAWQ's own order."""

from __future__ import annotations

import torch

from qtool.convert.formats import autoawq
from qtool.convert.formats.codes import UniformCodes
from qtool.convert.formats.packing import AWQ_ORDER, SEQUENTIAL, pack_nibbles, unpack_nibbles


def words(tensor: torch.Tensor) -> list[int]:
    return [value & 0xFFFFFFFF for value in tensor.flatten().tolist()]


def test_awq_order_as_literal_words() -> None:
    row = torch.arange(8, dtype=torch.uint8).unsqueeze(0)
    # nibble i holds column [0, 2, 4, 6, 1, 3, 5, 7][i]; nibble 0 is the lowest
    assert words(pack_nibbles(row, AWQ_ORDER)) == [0x75316420]


def test_sequential_order_as_literal_words() -> None:
    row = torch.arange(8, dtype=torch.uint8).unsqueeze(0)
    assert words(pack_nibbles(row, SEQUENTIAL)) == [0x76543210]


def test_unpacking_is_the_inverse() -> None:
    values = torch.randint(0, 16, (7, 64), dtype=torch.uint8)
    for order in (AWQ_ORDER, SEQUENTIAL):
        assert torch.equal(unpack_nibbles(pack_nibbles(values, order), order), values)


def test_unpacked_by_shifts_in_autoawqs_reverse_order() -> None:
    """AutoAWQ shifts out nibbles 0..7 and then takes them in the order [0, 4, 1, 5, 2, 6, 3, 7]."""
    values = torch.randint(0, 16, (5, 24), dtype=torch.uint8)
    packed = pack_nibbles(values, AWQ_ORDER)
    shifted = (packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    assert torch.equal(shifted[..., [0, 4, 1, 5, 2, 6, 3, 7]].reshape(5, 24).to(torch.uint8), values)


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
