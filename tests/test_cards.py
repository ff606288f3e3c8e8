"""Which card this machine has, told by its driver's name and memory."""

from __future__ import annotations

import pytest

from qtool.sizing.accelerators import load_accelerators, recognized

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "memory", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 85017493504, "H100"),  # as read on one
        ("NVIDIA H200", int(139.8 * GIB), "H200"),
        ("NVIDIA GeForce RTX 4090", int(23.6 * GIB), "RTX4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16 * GIB, None),
        ("NVIDIA A100-SXM4-40GB", int(39.4 * GIB), "A100-40"),
        ("NVIDIA A100-SXM4-80GB", int(79.2 * GIB), "A100-80"),
        ("NVIDIA L40S", int(44.4 * GIB), "L40S"),
        ("NVIDIA L40", int(44.4 * GIB), None),
        ("NVIDIA L4", int(22 * GIB), "L4"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", int(95 * GIB), "RTXPRO6000"),
        ("NVIDIA H100 NVL", int(93.1 * GIB), None),
        ("AMD Instinct MI300X", int(192 * GIB), "MI300X"),
        ("NVIDIA B300 SXM6 HBM3", int(384 * GIB), None),
    ],
)
def test_whole_words_and_memory_decide(name: str, memory: int, key: str | None) -> None:
    assert recognized(load_accelerators(), name, memory) == key
