"""Blocks: literal bytes, ggml's own sizes, the C quantizer in chunks and whole; importance matrices in both files."""

from __future__ import annotations

import builtins
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import QtoolError
from qtool.convert.formats.gguf import imatrix
from qtool.convert.formats.gguf.ggml import BLOCKS, GgmlBlocks, load_gguf, row_bytes
from qtool.quantize.methods import ggml, kquants
from qtool.quantize.methods.gguf import live

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


@pytest.mark.parametrize("type_name", ["Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL"])
def test_types_that_only_a_budget_takes(type_name: str) -> None:
    """Their bytes are ggml's; what qtool reads from them is what the gguf package reads."""
    pytest.importorskip("xllamacpp")
    weight, row = torch.randn(9, 512), torch.rand(512)
    found = ggml.quantize_ggml(weight, type_name, row)
    theirs = gguf.quants.dequantize(found.data.numpy(), gguf.GGMLQuantizationType[type_name])
    assert torch.equal(found.dequantize(), torch.from_numpy(theirs))
    assert (
        0.05
        < float((found.dequantize() - weight).norm() / weight.norm())
        < {"Q2_K": 0.35, "Q3_K": 0.2}.get(type_name, 0.1)
    )


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


@pytest.mark.parametrize(
    ("sums", "count", "said"),
    [
        ([0.0, 0.0], 4.0, "holds only zeros"),
        ([1.0, 2.0], 0.0, "holds sums of 0 tokens"),
        ([1.0, 2.0], -3.0, "NaN, Inf or negative"),
        ([1.0, 2.0], float("nan"), "NaN, Inf or negative"),
        ([1.0, 2.0], float("inf"), "NaN, Inf or negative"),
        ([3e38, 2.0], 1e-9, "too large for its count"),
    ],
)
def test_rows_that_are_no_means_are_refused(sums: list[float], count: float, said: str, tmp_path: Path) -> None:
    """A row of zeros lets every error of its weights pass: llama.cpp then writes zeros for all of them."""
    path = tmp_path / "m.gguf"
    _sums(path, {"blk.0.ffn_down.weight": ([sums], [[count]])})
    with pytest.raises(QtoolError, match=rf"m\.gguf: .*blk\.0\.ffn_down\.weight.* {said}"):
        imatrix.read_imatrix(path)


def _sums(path: Path, entries: dict[str, tuple[list[list[float]], list[list[float]]]]) -> None:
    writer = gguf.GGUFWriter(path, "imatrix")
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", torch.tensor(sums).numpy())
        writer.add_tensor(f"{name}.counts", torch.tensor(counts).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_experts_that_saw_nothing_count_alike_and_zeros_beside_a_count_do_not(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    _sums(path, {"x": ([[2.0, 4.0], [0.0, 0.0]], [[2.0], [0.0]])})
    assert imatrix.read_imatrix(path)["x"].tolist() == [1.0, 2.0, 1.0, 1.0]
    _sums(path, {"x": ([[2.0, 4.0], [0.0, 0.0]], [[2.0], [5.0]])})
    with pytest.raises(QtoolError, match=r"x \(matrix 1 of 2\) holds only zeros"):
        imatrix.read_imatrix(path)
    _sums(path, {"x": ([[2.0, 0.0]], [[2.0]])})  # single channels may be zero
    assert imatrix.read_imatrix(path)["x"].tolist() == [1.0, 0.0]


def test_half_an_entry_of_an_imatrix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for lone in ("x.in_sum2", "x.counts"):
        writer = gguf.GGUFWriter(path, "imatrix")
        writer.add_tensor("y.in_sum2", torch.ones(1, 2).numpy())
        writer.add_tensor("y.counts", torch.ones(1, 1).numpy())
        writer.add_tensor(lone, torch.ones(1, 1).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(QtoolError, match=r"x has \.in_sum2 or \.counts alone"):
            imatrix.read_imatrix(path)


@pytest.mark.parametrize(
    ("calls", "values", "said"),
    [
        (3, [0.0, 0.0], "only zeros"),
        (0, [1.0, 1.0], "sums of 0"),
        (-1, [1.0, 1.0], "negative"),
        (2, [-1.0, 1.0], "neg"),
    ],
)
def test_old_imatrix_files_are_held_to_the_same(calls: int, values: list[float], said: str, tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    path.write_bytes(struct.pack("<ii", 1, 1) + b"w" + struct.pack("<ii2f", calls, 2, *values))
    with pytest.raises(QtoolError, match=said):
        imatrix.read_imatrix(path)


def test_a_row_of_zeros_of_ones_own_pass_comes_back_as_it_was_used(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    imatrix.write_imatrix(path, {"w": torch.zeros(4), "v": torch.tensor([0.0, 2.0])}, 1, 8, "x")
    rows = imatrix.read_imatrix(path)
    assert live(torch.zeros(4)).tolist() == live(rows["w"]).tolist() == [1.0] * 4
    assert rows["v"].tolist() == [0.0, 2.0]


@pytest.mark.parametrize("type_name", ["Q4_K", "Q5_K", "Q6_K", "Q5_0"])
def test_no_importance_row_makes_weights_vanish(type_name: str) -> None:
    """Whatever counts 0, or hardly, keeps a scale: without `live` the C code writes zeros for whole groups."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 1024, generator=generator)
    row = torch.rand(1024, generator=generator) + 0.1
    rows = {
        "all": torch.zeros(1024),
        "super-block": row * (torch.arange(1024) >= 256),
        "group": row * (torch.arange(1024) >= 16),
        "middle": row * ((torch.arange(1024) < 512) | (torch.arange(1024) >= 544)),
        "most": row * (torch.arange(1024) % 16 == 0),
        "tiny": row * 1e-37,
        "huge": row * 1e34,
        "far apart": row * torch.where(torch.arange(1024) < 256, 1e-20, 1e3),
    }
    for name, given in rows.items():
        for quantize in (ggml.quantize_ggml, kquants.quantize):
            found = quantize(weight, type_name, live(given)).dequantize()
            error = (found - weight).view(4, -1, 16).norm(dim=-1) / weight.view(4, -1, 16).norm(dim=-1)
            assert float(error.max()) < 0.25, name
    bare = ggml.quantize_ggml(weight, type_name, rows["super-block"]).dequantize()
    assert not bool(bare[:, :256].any())  # what is planted here is a fault there
    assert torch.equal(live(row), row)
