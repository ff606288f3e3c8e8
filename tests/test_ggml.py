"""Blocks: literal bytes, ggml's own sizes, the C quantizer in chunks and whole; importance matrices in both files."""

from __future__ import annotations

import builtins
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import QtoolError
from qtool.convert import imatrix
from qtool.convert.ggml import BLOCKS, GgmlBlocks, load_gguf, row_bytes
from qtool.quantize import ggml

gguf: Any = pytest.importorskip("gguf")
TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q5_0", "Q5_1")


def test_sizes_are_ggmls() -> None:
    for name, size in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == size
    with pytest.raises(ValueError, match="40 columns do not divide into Q4_K blocks of 256"):
        row_bytes("Q4_K", 40)


def test_literal_q4_k_super_block() -> None:
    """x = d * scale * q - dmin * min; the first four scales and mins are the low six bits of bytes 0-3 and 4-7."""
    scales = bytes([1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0])
    block = struct.pack("<ee", 0.5, 0.25) + scales + bytes([0x21] * 128)
    data = torch.frombuffer(bytearray(block), dtype=torch.uint8).view(1, -1)
    values = GgmlBlocks(data, "Q4_K", (1, 256)).dequantize()[0]
    assert values[:32].tolist() == [0.5 * 1 * 1 - 0.25 * 5] * 32  # low nibbles: sub-block 0
    assert values[32:64].tolist() == [0.5 * 2 * 2 - 0.25 * 6] * 32  # high nibbles: sub-block 1
    assert values[128:].tolist() == [0.0] * 128


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("weighed", [True, False])
def test_chunks_change_nothing(type_name: str, weighed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    weight = torch.randn(9, 512)
    weight[3] = 0
    row = torch.rand(512) if weighed else None
    whole = ggml.quantize_ggml(weight, type_name, row)
    monkeypatch.setattr(ggml, "CHUNK_WEIGHTS", 1024)
    assert ggml.quantize_ggml(weight, type_name, row).equals(whole)
    restored = whole.dequantize()
    assert not restored[3].any()
    assert (restored - weight).norm() < 0.12 * weight.norm()
    if type_name == "Q8_0":  # the gguf package's own quantizer, where it has one
        theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
        assert torch.equal(whole.data, torch.from_numpy(theirs))


def test_importance_lowers_the_weighed_error() -> None:
    pytest.importorskip("xllamacpp")
    weight, row = torch.randn(64, 512), torch.rand(512) ** 8
    error = {}
    for name, given in (("weighed", row), ("plain", None)):
        error[name] = float(((ggml.quantize_ggml(weight, "Q4_K", given).dequantize() - weight).square() * row).sum())
    assert error["weighed"] < 0.9 * error["plain"]


def test_floats_round_once() -> None:
    weight = torch.randn(4, 8)
    assert torch.equal(ggml.quantize_ggml(weight, "BF16").dequantize(), weight.bfloat16().float())
    assert torch.equal(ggml.quantize_ggml(weight, "F32").dequantize(torch.float16), weight.half())


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "_candidates", lambda: iter(()))
    ggml.load_library.cache_clear()
    with pytest.raises(QtoolError, match=r"not installed here\. Run: pip install 'qtool-llm\[gguf\]'") as caught:
        ggml.quantize_ggml(torch.zeros(1, 256), "Q4_K")
    assert caught.value.exit_code == 3
    ggml.load_library.cache_clear()
    real = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(QtoolError, match="GGUF files need the gguf package"):
        load_gguf()


def test_imatrix_round_trip_and_legacy(tmp_path: Path) -> None:
    rows = {"blk.0.attn_q.weight": torch.rand(64), "blk.0.ffn_down.weight": torch.rand(32)}
    path = tmp_path / "imatrix.gguf"
    imatrix.write_imatrix(path, rows, chunks=3, chunk_size=128, dataset="text")
    for name, row in imatrix.read_imatrix(path).items():
        torch.testing.assert_close(row, rows[name])
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert {t.name: t.data.tolist() for t in reader.tensors}["blk.0.attn_q.weight.counts"] == [[384.0]]
    legacy = struct.pack("<ii", 1, 19) + b"blk.0.attn_q.weight" + struct.pack("<ii2f", 4, 2, 2.0, 6.0)
    old = tmp_path / "imatrix.dat"
    old.write_bytes(legacy + struct.pack("<ii", 1, 0))
    assert imatrix.read_imatrix(old)["blk.0.attn_q.weight"].tolist() == [0.5, 1.5]


SHORT = struct.pack("<ii", 1, 4) + b"name" + struct.pack("<ii", 1, 9)


@pytest.mark.parametrize("data", [b"", b"GGUF", b"\xff" * 64, SHORT])
def test_hostile_imatrix_files(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(QtoolError, match="not an importance matrix"):
        imatrix.read_imatrix(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_importance_that_is_no_mean_square_is_named(value: float, tmp_path: Path) -> None:
    row = torch.ones(8)
    row[3] = value
    imatrix.write_imatrix(tmp_path / "m.gguf", {"blk.0.attn_q.weight": row}, 1, 8, "x")
    with pytest.raises(QtoolError, match=r"blk\.0\.attn_q\.weight holds NaN, Inf or negative numbers"):
        imatrix.read_imatrix(tmp_path / "m.gguf")
