"""Which processors are taken to multiply bfloat16 fast."""

from __future__ import annotations

import platform

import pytest
import torch

from qtool.quantize.precision import fast_bfloat16


@pytest.mark.parametrize(
    ("machine", "onednn", "avx512_bf16", "amx", "fast"),
    [
        ("x86_64", True, False, False, False),  # Ice Lake: AVX-512, and bfloat16 emulated four times as slow
        ("x86_64", True, True, False, True),  # Cooper Lake, Zen 4
        ("x86_64", True, True, True, True),  # Sapphire Rapids
        ("x86_64", False, True, False, False),  # oneDNN left out
        ("AMD64", True, False, False, False),
        ("aarch64", True, False, False, True),  # oneDNN asks an Arm processor itself
        ("aarch64", False, False, False, False),
    ],
)
def test_bfloat16_is_fast_where_there_are_instructions_for_it(
    machine: str, onednn: bool, avx512_bf16: bool, amx: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert fast_bfloat16() is fast
