"""What verify sees of a tensor in pieces is what it would see of the whole."""

from __future__ import annotations

import math

import pytest
import torch

from qtool.convert.formats.bnb_nf4 import NF4
from qtool.convert.formats.codes import Codes, Nested, Nf4Blocks, UniformCodes
from qtool.convert.formats.gguf.ggml import BLOCKS, GgmlBlocks
from qtool.convert.verify import tensors
from qtool.convert.verify.tensors import Seen, hollow, see, see_codes

NAN, INF = math.nan, math.inf


def whole(weight: torch.Tensor) -> Seen:
    flat = weight.double().flatten().tolist()
    bad = any(math.isnan(x) for x in flat)
    low, high = (NAN, NAN) if bad else (min(flat), max(flat))
    return Seen(len(flat), sum(x == 0 for x in flat), low, high)


@pytest.mark.parametrize("planted", [None, NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 17, 47])
def test_pieces_say_what_the_whole_says(planted: float | None, place: int) -> None:
    weight = torch.randn(12, 4)
    weight[3] = 0
    if planted is not None:
        weight.view(-1)[place] = planted
    found, expected = see(weight.split(5)), whole(weight)
    assert (found.count, found.zeros, found.finite) == (48, expected.zeros, planted is None)
    if planted is None or not math.isnan(planted):
        assert found == expected
    said = list(hollow("w", found))
    assert bool(said) == (planted is not None)


def test_nothing_is_finite_and_hollow() -> None:
    assert see([]).finite
    assert see([torch.empty(0)]) == Seen()
    assert list(hollow("w", Seen())) == ["w is all zero"]
    assert list(hollow("w", see([torch.zeros(3), torch.zeros(4)]))) == ["w is all zero"]
    assert list(hollow("w", see([torch.ones(3), torch.ones(4)]))) == ["w is 1 throughout"]
    assert next(iter(hollow("w", see([torch.zeros(300), torch.ones(1)])))).startswith("w is zero but for 0.33%")


def uniform(scattered: bool) -> UniformCodes:
    g_idx = torch.randperm(64) % 2 if scattered else None
    return UniformCodes(
        torch.randint(0, 16, (40, 64), dtype=torch.uint8), torch.rand(40, 2).half(),
        torch.randint(0, 16, (40, 2), dtype=torch.uint8), 4, 32, g_idx,
    )  # fmt: skip


def nf4(rows: int, columns: int, nested: bool) -> Nf4Blocks:
    blocks = -(-rows * columns // 64)
    inner = Nested(torch.rand(-(-blocks // 256)), torch.rand(256), 256, 0.3) if nested else None
    maxima = torch.randint(0, 256, (blocks,), dtype=torch.uint8) if nested else torch.rand(blocks)
    packed = torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8)
    return Nf4Blocks(packed, maxima, torch.tensor(NF4), (rows, columns), 64, torch.bfloat16, inner)


def ggml(kind: str) -> GgmlBlocks:
    elements, size = BLOCKS[kind]
    return GgmlBlocks(torch.randint(0, 100, (37, 512 // elements * size), dtype=torch.uint8), kind, (37, 512))


CODES: dict[str, Codes] = {
    "uniform": uniform(False), "scattered": uniform(True), "nf4": nf4(37, 64, False), "nested": nf4(300, 128, True),
    "rows that do not end with blocks": nf4(5, 40, True), "a last part": nf4(33, 96, True),
    **{kind: ggml(kind) for kind in BLOCKS if kind not in ("F32", "F16", "BF16")},
}  # fmt: skip


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("weights", [1, 128, 700, 4096, 10**9])
def test_pieces_of_codes_dequantize_to_the_whole(name: str, weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("Q4_0", "Q4_1"):
        pytest.importorskip("gguf")
    codes = CODES[name]
    pieces = list(codes.pieces(weights))
    expected = codes.dequantize()
    assert torch.equal(torch.cat([piece.dequantize() for piece in pieces]), expected)
    if weights == 700 and name != "rows that do not end with blocks":
        assert len(pieces) > 1
    monkeypatch.setattr(tensors, "PIECE", {"cpu": weights})
    assert see_codes(codes) == whole(expected)
